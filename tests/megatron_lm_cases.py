"""Command lines of Megatron-LM without it: its parser and its translation of arguments, as small as they can be."""

import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from types import ModuleType

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel

from mcore_cases import TOKENS, make_config
from nsa_dist.mcore import NSASelfAttention, nsa_layer_spec, nsa_mtp_spec
from nsa_dist.mcore.megatron_lm import add_nsa_arguments, build_gpt

WORDS = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--kv-channels 16 --seq-length 4096 --nsa-window-len 64 --nsa-num-slc-blocks 4"""


def parser() -> ArgumentParser:
    """As Megatron-LM builds it: its own arguments first, with what they are where nobody says anything."""
    stub = ArgumentParser(allow_abbrev=False)
    for name in ("num-layers", "hidden-size", "num-attention-heads", "num-query-groups", "kv-channels", "seq-length"):
        stub.add_argument(f"--{name}", type=int)
    stub.add_argument("--mtp-num-layers", type=int, default=None)
    stub.add_argument("--group-query-attention", action="store_true")
    stub.add_argument("--rotary-base", type=int, default=10_000)
    stub.add_argument("--attention-dropout", type=float, default=0.1)
    stub.add_argument("--position-embedding-type", default="learned_absolute")
    stub.add_argument("--no-rope-fusion", action="store_false", dest="apply_rope_fusion")
    stub.add_argument("--qk-layernorm", action="store_true")
    stub.add_argument("--spec", nargs="*", default=None)
    stub.add_argument(
        "--no-create-attention-mask-in-dataloader",
        action="store_false",
        dest="create_attention_mask_in_dataloader",
    )
    return add_nsa_arguments(stub)


def parsed(*words: str) -> Namespace:
    return parser().parse_args([*WORDS.split(), *words])


def translation(args: Namespace, config_class: type) -> object:
    """What Megatron-LM's core_transformer_config_from_args does with most arguments: copies them by name."""
    fields = {f.name for f in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in vars(args).items() if name in fields})


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Megatron-LM's own translation is imported from, the one above."""
    module = ModuleType("megatron.training.arguments")
    module.core_transformer_config_from_args = translation
    monkeypatch.setitem(sys.modules, "megatron.training", ModuleType("megatron.training"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


# --- what a rank runs -------------------------------------------------------------------------------------------------

MODEL = Namespace(
    padded_vocab_size=64,
    max_position_embeddings=TOKENS,
    fp16_lm_cross_entropy=False,
    untie_embeddings_and_output_weights=True,
)


def losses(model: GPTModel) -> torch.Tensor:
    tokens = torch.arange(TOKENS)[None] % 64
    return model(tokens, torch.zeros_like(tokens), None, labels=tokens)


def seeded() -> None:
    torch.manual_seed(3)
    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)


def models_of_arguments() -> None:
    """`build_gpt` gives the model that a user builds by hand, with and without multi-token prediction."""
    for changes in ({}, {"mtp_num_layers": 1}):
        config = make_config(num_layers=2, params_dtype=torch.float32, transformer_impl="local", **changes)
        seeded()
        model = build_gpt(MODEL, pre_process=True, post_process=True, config=config)
        seeded()
        by_hand = GPTModel(
            config,
            nsa_layer_spec(config),
            vocab_size=64,
            max_sequence_length=TOKENS,
            position_embedding_type="none",
            mtp_block_spec=nsa_mtp_spec(config),
        )
        loss = losses(model)
        assert torch.equal(loss, losses(by_hand))
        layers = 2 + len(changes)
        assert sum(isinstance(m, NSASelfAttention) for m in model.modules()) == layers
        loss.mean().backward()
        assert all(p.grad is not None for p in model.parameters())
