"""Runs whose layers have experts: importable, because spawned processes find their work by name."""

import shutil
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from nsa_dist.train import loop
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.experts.router import SampleTokens
from nsa_dist.train.model import bare_model
from nsa_dist.train.world import entered
from train_cases import FORK_STEP, StopAfter, copied, run, small_config

STEPS = FORK_STEP + 20
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.05}
MODELS: dict[str, dict] = {
    "experts": EXPERTS,
    "shared": {**EXPERTS, "moe_shared_expert_intermediate_size": 16, "moe_layer_freq": [0, 1]},
}
LAYOUTS: dict[str, dict] = {
    "CP2": {"parallel": {"context_parallel_size": 2}},
    "CP2 contiguous": {"parallel": {"context_parallel_size": 2, "layout": "contiguous"}},
    "TP2": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "DP2": {},
    "DP2 in four": {"run": {"micro_batch_size": 1}},
    "CP4": {"parallel": {"context_parallel_size": 4}},
    "TP2, CP2": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}},
}
PACKED_LAYOUTS: dict[str, dict] = {
    "CP2 by rows": {"parallel": {"context_parallel_size": 2}},
    "CP2 by documents": {"parallel": {"context_parallel_size": 2, "pack_order": "documents"}},
    "DP2 in four": {"run": {"micro_batch_size": 1}},
}
STARTS = [("shared", "TP2"), ("shared.folder", "TP2"), ("shared.folder", "PP2")]
BACK = [("shared", "TP2"), ("experts", "PP2")]  # and back to one process
OF_FOUR = ("CP4", "TP2, CP2")
RUNS = [
    *(("experts", layout) for layout in LAYOUTS),
    *(("shared", layout) for layout in ("CP2", "TP2", "PP2", "TP2, CP2")),
    *(("packed", layout) for layout in PACKED_LAYOUTS),
]


def layout_of(name: str, layout: str) -> dict:
    return (PACKED_LAYOUTS if name == "packed" else LAYOUTS)[layout]


def config(base: Path, folder: str, name: str, **sections: dict) -> TrainConfig:
    lengths = {
        "steps": STEPS, "eval_interval": STEPS, "checkpoint_interval": STEPS, "replica_check_interval": STEPS // 2,
        **sections.pop("run", {}),
    }  # fmt: skip
    model = {**MODELS.get(name, EXPERTS), **sections.pop("model", {})}
    data = {"documents": "packed"} if name == "packed" else {}
    sections.setdefault("optimizer", {"adam_eps": 2e-5})  # docs/decisions/tiny-job.md: at 1e-8 rounding moves weights
    return small_config(base, folder, model=model, run=lengths, data=data, **sections)


def alone(rank: int, base: Path) -> None:
    """Each model to the end by one process, which stopped on the way; one is exported, one not told to be even."""
    for name in (*MODELS, "packed"):
        run(config(base, f"{name} fork", name), StopAfter(FORK_STEP))
        shutil.copytree(base / f"{name} fork", base / name)
        run(config(base, name, name).resuming())
    run(config(base, "uneven", "experts", model={"moe_aux_loss_coeff": 0.0}))


def halfway(rank: int, base: Path) -> None:
    """The forks on for some steps, each in its layout."""
    for name, layout in BACK:
        folder = f"{name} {layout} and back"
        copied(rank, base / f"{name} fork", base / folder)
        run(config(base, folder, name, **layout_of(name, layout)).resuming(), StopAfter(10))


def back(rank: int, base: Path) -> None:
    """Those to the end, by one process."""
    for name, layout in BACK:
        run(config(base, f"{name} {layout} and back", name).resuming())


def starting(rank: int, base: Path) -> None:
    """Runs that begin where another ended, with its checkpoint's weights or those of its folder, and move none."""
    still = {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "warmup_steps": 0}
    for source, layout in STARTS:
        keys = {"steps": 1, "start_from": base / source}
        run(config(base, f"of {source} {layout}", "shared", run=keys, optimizer=still, **LAYOUTS[layout]))


def over_ranks(rank: int, base: Path, runs: list[tuple[str, str]]) -> None:
    """The forks to the end, each in its layout."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        for name, layout in runs:
            folder = f"{name} {layout}"
            copied(rank, base / f"{name} fork", base / folder)
            run(config(base, folder, name, **layout_of(name, layout)).resuming())


class Naive(NamedTuple):
    """What a router said of drawn tokens, and what the formulas say."""

    weights: tuple[Tensor, Tensor]
    loss: tuple[float, float]
    grad: tuple[Tensor, Tensor]
    counts: tuple[list[int], list[int]]


def routed(rank: int, base: Path) -> Naive:
    """Three samples of 5 tokens and two of padding, through a router of a model, and token by token."""
    run_config = config(base, "routed", "experts")
    with entered(run_config, torch.device("cpu")) as world:
        router = bare_model(run_config, world)[1].decoder.layers[1].mlp.router.train()
        draw = torch.Generator().manual_seed(5)
        x, of = torch.randn(17, 1, 32, generator=draw), torch.tensor([0, 1, 2] * 5 + [-1, -1])
        router.start_counting()
        router.tokens = SampleTokens(of, 3, 5)
        weights, taken = router(x)
        (weights * 0).sum().backward()
        found = router.seen.tolist()
        weight = router.weight.detach().clone().requires_grad_()
        expected, by_token = torch.zeros(17, 4), torch.zeros(3, 4)
        score_sums = [torch.zeros(4), torch.zeros(4), torch.zeros(4)]
        for token in range(17):
            logits = weight @ x[token, 0]
            best = logits.argsort(descending=True)[:2].tolist()
            for expert in best:
                expected[token, expert] = logits[expert].exp().detach() / sum(logits[e].exp().detach() for e in best)
            if (sample := int(of[token])) >= 0:
                by_token[sample, best] += 1
                score_sums[sample] = score_sums[sample] + logits.softmax(0)
        losses = [4 * (by_token[s] / 10 * score_sums[s] / 5).sum() for s in range(3)]
        sum(0.05 * 5 * loss for loss in losses).backward()
        assert (taken.sum(-1) == 2).all()
        return Naive(
            (weights.detach(), expected), (found[-1], float(sum(losses).detach())), (router.weight.grad, weight.grad),
            ([int(count) for count in found[:-1]], [int(count) for count in by_token.sum(0)]),
        )  # fmt: skip
