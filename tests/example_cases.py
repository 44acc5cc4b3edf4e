"""What the ranks of tests/examples run: importable, because spawned processes find their work by name."""

import importlib.util
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import torch

from mcore_cases import SINGLE, TOKENS, groups, make_config

EXAMPLES = Path(__file__).parents[1] / "examples"


def pretrain_nsa() -> ModuleType:
    """The example for Megatron-LM as a module; importing it needs Megatron-core alone."""
    spec = importlib.util.spec_from_file_location("pretrain_nsa", EXAMPLES / "megatron_lm/pretrain_nsa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loss_of_built_model(rank: int) -> list[float]:
    """Losses of every token of a model that the example builds, as Megatron-LM's `model_provider` would have it."""
    args = Namespace(
        padded_vocab_size=64,
        max_position_embeddings=TOKENS,
        fp16_lm_cross_entropy=False,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="none",
    )
    with groups(SINGLE):
        config = make_config(params_dtype=torch.float32, transformer_impl="local")
        model = pretrain_nsa().build_model(args, pre_process=True, post_process=True, config=config)
        tokens = torch.arange(TOKENS)[None] % 64
        loss = model(tokens, torch.zeros_like(tokens), None, labels=tokens)
        loss.mean().backward()
        assert all(p.grad is not None for p in model.parameters())
    return loss.flatten().tolist()
