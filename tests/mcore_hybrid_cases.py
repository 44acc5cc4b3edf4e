"""HybridModels of NSA layers beside GPTModels of the same weights. Needs Megatron-core 0.19 or later."""

import traceback
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel

from mcore_cases import SINGLE, TOKENS, Layout, expect_error, groups, make_config
from mcore_model_cases import EXPERTS, VOCAB, build, loss_of
from nsa_dist.mcore import NSASelfAttention
from nsa_dist.mcore.hybrid.stack import nsa_stack_spec

WORLD = 2
LAYOUTS = {"TP2 with sequence parallelism": Layout(tp=2, sequence_parallel=True), "CP2": Layout(cp=2)}


def hybrid(layout: Layout, pattern: str, **changes) -> HybridModel:
    layers = len(pattern.split("/")[0])
    config = make_config(layout, **{"num_layers": layers, "params_dtype": torch.float32, **changes})
    return HybridModel(config, nsa_stack_spec(config), VOCAB, TOKENS, hybrid_layer_pattern=pattern)


@torch.no_grad()
def take_weights(model: HybridModel, gpt: GPTModel) -> None:
    """Layers 2i and 2i + 1 of the pattern `*-*-` are attention and MLP of the GPT's layer i."""
    of_gpt = dict(gpt.named_parameters())
    for name, parameter in model.named_parameters():
        parts = name.replace("final_norm", "final_layernorm").split(".")
        if "layers" in parts:
            parts[2] = str(int(parts[2]) // 2)
        parameter.copy_(of_gpt[".".join(parts)])


def everything(rank: int) -> dict[str, str]:
    """{what was tried: "" or how it failed on this rank}."""
    results = {}
    with groups(SINGLE):
        expected = loss_of(build(SINGLE), SINGLE).detach()
        for name, work in ALONE.items():
            results[name] = outcome(work)
        results["one process"] = outcome(partial(is_the_gpt, SINGLE, expected))
    for name, layout in LAYOUTS.items():
        with groups(layout):
            results[name] = outcome(partial(is_the_gpt, layout, expected))
    return results


def outcome(work) -> str:
    try:
        work()
    except Exception:
        return traceback.format_exc()
    return ""


def is_the_gpt(layout: Layout, expected: torch.Tensor) -> None:
    model = hybrid(layout, "*-*-")
    take_weights(model, build(layout))
    loss = loss_of(model, layout)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    if layout.cp == 1:  # what was gathered has no gradient
        loss.mean().backward()
        assert all(p.grad is not None for p in model.parameters())


def experts_and_further_tokens() -> None:
    model = hybrid(SINGLE, "*E*-/*-", mtp_num_layers=1, **EXPERTS)
    assert sum(isinstance(m, NSASelfAttention) for m in model.modules()) == 3
    loss_of(model, SINGLE).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def layers_that_the_stack_has_not() -> None:
    for sign in "MG":
        expect_error(
            partial(hybrid, SINGLE, f"*{sign}"), f"hybrid_layer_pattern has '{sign}', but .*; write the pattern"
        )
    expect_error(partial(hybrid, SINGLE, "*E"), "needs num_moe_experts set")


ALONE = {
    "experts and further tokens": experts_and_further_tokens,
    "layers that the stack has not": layers_that_the_stack_has_not,
}
PROMISES = [*ALONE, "one process", *LAYOUTS]
