"""Whole GPT models on two ranks: norms, experts, masks and positions of models that were not made for NSA."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.safe_globals import register_safe_globals
from megatron.core.transformer.moe import moe_utils
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from mcore_cases import SINGLE, TOKENS, Layout, expect_error, gathered, groups, make_config
from mcore_pack_cases import megatron_arguments
from megatron_lm_cases import models_of_arguments
from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.cp.options import FetchOptions
from nsa_dist.mcore import nsa_block_spec, nsa_layer_spec
from nsa_dist.mcore.norm import LayerNorm, RMSNorm
from ranks import attempted

WORLD = 2
VOCAB = 64
CP2 = Layout(cp=2)
TP2_SP = Layout(tp=2, sequence_parallel=True)
NORMS: dict[str, dict] = {
    "RMSNorm": {},
    "LayerNorm": {"normalization": "LayerNorm"},
    "RMSNorm around one": {"layernorm_zero_centered_gamma": True},
    "LayerNorm around one": {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.0}


def build(layout: Layout, changes: dict | None = None, spec: Callable = nsa_block_spec, **model) -> GPTModel:
    config = make_config(layout, **{"num_layers": 2, "params_dtype": torch.float32, **(changes or {})})
    torch.manual_seed(3)
    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    arguments = {"vocab_size": VOCAB, "max_sequence_length": TOKENS, "position_embedding_type": "none", **model}
    return GPTModel(config, spec(config), **arguments)


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(4))


def loss_of(model: GPTModel, layout: Layout, mask: Tensor | None = None) -> Tensor:
    """Of every token, in order: [b, s]."""
    plan = ShardPlan.zigzag([0, TOKENS], layout.cp, 16)
    ids = plan.shard(tokens().T, parallel_state.get_context_parallel_rank()).T.contiguous()
    loss = model(ids, torch.zeros_like(ids), mask, labels=ids)
    if layout.cp == 1:
        return loss
    return plan.unshard(gathered(loss.T, parallel_state.get_context_parallel_group())).T


def everything(rank: int, folder: str) -> dict[str, str]:
    """{what was tried: "" or how it failed on this rank}."""
    results: dict[str, str] = {}
    attempt = partial(attempted, results)

    with groups(SINGLE):
        expected = {name: loss_of(build(SINGLE, changes), SINGLE).detach() for name, changes in NORMS.items()}
        for name, work in ALONE.items():
            attempt(name, work)
        attempt("arguments in a checkpoint", lambda: arguments_in_a_checkpoint(folder))
    with groups(TP2_SP):
        for name, changes in NORMS.items():
            attempt(f"norms: {name}", lambda n=name, c=changes: agrees(TP2_SP, c, expected[n]))
        attempt("a layer spec under sequence parallelism", lambda: refuses_layer_spec(TP2_SP))
    with groups(CP2):
        attempt("masks cut by Megatron", lambda: masks_over_ranks(expected["RMSNorm"]))
    return results


def agrees(layout: Layout, changes: dict, expected: Tensor) -> None:
    torch.testing.assert_close(loss_of(build(layout, changes), layout), expected, rtol=1e-5, atol=1e-5)


def norms_are_what_was_asked_for() -> None:
    for changes in NORMS.values():
        model = build(SINGLE, changes)
        kind = RMSNorm if changes.get("normalization") is None else LayerNorm
        norms = [model.decoder.final_layernorm]
        norms += [n for layer in model.decoder.layers for n in (layer.input_layernorm, layer.pre_mlp_layernorm)]
        assert {type(norm) for norm in norms} == {kind}
        expected = 0.0 if changes.get("layernorm_zero_centered_gamma") else 1.0
        assert all(norm.weight.eq(expected).all() for norm in norms)
    x = torch.randn(4, 32)
    plain, centered = (build(SINGLE, NORMS[n]).decoder.final_layernorm for n in ("LayerNorm", "LayerNorm around one"))
    torch.nn.init.normal_(plain.weight)
    with torch.no_grad():
        centered.weight.copy_(plain.weight - 1)
    torch.testing.assert_close(centered(x), plain(x))


def refuses_layer_spec(layout: Layout) -> None:
    expect_error(lambda: build(layout, spec=nsa_layer_spec), r"pass nsa_block_spec\(config\) to the model")
    expect_error(
        lambda: build(layout, {"persist_layer_norm": True}, nsa_layer_spec),
        "sequence_parallel=True, persist_layer_norm",
    )


def experts_are_built() -> None:
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # what 0.16.1 means where there is no Transformer Engine, and forgets to say
    for spec in (nsa_layer_spec, nsa_block_spec):
        model = build(SINGLE, EXPERTS, spec)
        for layer in model.decoder.layers:
            assert len(layer.mlp.experts.local_experts) == 4
        loss_of(model, SINGLE).mean().backward()
        assert model.decoder.layers[0].mlp.router.weight.grad.abs().max() > 0


def learned_positions() -> None:
    expect_error(
        lambda: build(SINGLE, position_embedding_type="learned_absolute"), "pass position_embedding_type='none'"
    )
    config = make_config(params_dtype=torch.float32)
    expect_error(lambda: GPTModel(config, nsa_layer_spec(config), VOCAB, TOKENS), "pass position_embedding_type='none'")


ROTARY: dict[str, dict] = {
    "base": {"rotary_base": 500_000},
    "percent": {"rotary_percent": 0.5},
    "interpolation": {"seq_len_interpolation_factor": 4},
    "scaling": {"rope_scaling": True},
}


# What NSATransformerConfig is told, and GPTModel, of the same positions.
SAME_ROTARY: dict[str, tuple[dict, dict]] = {
    "base": ({"nsa_rotary_base": 500_000.0}, {"rotary_base": 500_000}),
    "percent": ({"rotary_percent": 0.5}, {"rotary_percent": 0.5}),
    "interpolation": ({"rotary_seq_len_interpolation_factor": 4}, {"seq_len_interpolation_factor": 4}),
    "scaling": (
        {"use_rope_scaling": True, "rope_scaling_factor": 16.0, "nsa_rotary_base": 5e5},
        {"rope_scaling": True, "rope_scaling_factor": 16.0, "rotary_base": 5e5},
    ),
    "YaRN": (
        {"yarn_rotary_scaling_factor": 8.0, "yarn_original_max_position_embeddings": 64},
        {"position_embedding_type": "yarn"},
    ),
}


def rotary_positions() -> None:
    """A model's own rotary positions are the layer's, or refused."""
    expected = loss_of(build(SINGLE), SINGLE)
    assert torch.equal(loss_of(build(SINGLE, position_embedding_type="rope"), SINGLE), expected)
    remedy = "set nsa_rotary_base to the model's rotary_base"
    for name, other in ROTARY.items():
        model = build(SINGLE, position_embedding_type="rope", **other)
        try:
            expect_error(lambda model=model: loss_of(model, SINGLE), remedy)
        except BaseException as error:
            raise AssertionError(f"{name} was accepted") from error
    for name, (of_layers, of_model) in SAME_ROTARY.items():
        turned = loss_of(build(SINGLE, of_layers, **{"position_embedding_type": "rope", **of_model}), SINGLE)
        assert (turned - expected).abs().max() > 0, name


def causal_mask() -> Tensor:
    return torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)


def block_diagonal_mask() -> Tensor:
    document = torch.arange(TOKENS) >= 100
    return causal_mask() | (document[:, None] != document)


def masks() -> None:
    for changes in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        model = build(SINGLE, changes)
        loss = loss_of(model, SINGLE, causal_mask())
        assert torch.equal(loss, loss_of(model, SINGLE))
        loss.mean().backward()
        expect_error(lambda model=model: loss_of(model, SINGLE, block_diagonal_mask()), "pass attention_mask=None")


def masks_over_ranks(expected: Tensor) -> None:
    model = build(CP2)

    def cut(mask: Tensor) -> Tensor:
        batch = {"attention_mask": mask}
        group = parallel_state.get_context_parallel_group()
        return get_batch_on_this_cp_rank(batch, cp_group=group, **megatron_arguments())["attention_mask"]

    torch.testing.assert_close(loss_of(model, CP2, cut(causal_mask())), expected, rtol=1e-5, atol=1e-5)
    expect_error(lambda: loss_of(model, CP2, cut(block_diagonal_mask())), "pass attention_mask=None")


def arguments_in_a_checkpoint(folder: str) -> None:
    """Megatron-LM keeps its arguments with the weights, and reads both as weights only."""
    register_safe_globals()
    path = Path(folder, "arguments")
    path.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    arguments = argparse.Namespace(nsa=NSAConfig(window_len=64), nsa_fetch=FetchOptions(head_groups=2), lr=1e-3)
    dist_checkpointing.save({"args": arguments, **build(SINGLE).sharded_state_dict()}, str(path))
    loaded = dist_checkpointing.load_common_state_dict(str(path))["args"]
    assert (loaded.nsa, loaded.nsa_fetch, loaded.lr) == (arguments.nsa, arguments.nsa_fetch, arguments.lr)


ALONE: dict[str, Callable[[], None]] = {
    "norms are what was asked for": norms_are_what_was_asked_for,
    "experts are built": experts_are_built,
    "learned positions": learned_positions,
    "rotary positions": rotary_positions,
    "masks": masks,
    "models of Megatron-LM's arguments": models_of_arguments,
}
PROMISES = [
    *ALONE,
    *(f"norms: {name}" for name in NORMS),
    "a layer spec under sequence parallelism",
    "masks cut by Megatron",
    "arguments in a checkpoint",
]
