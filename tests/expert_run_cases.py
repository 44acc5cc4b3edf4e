"""Runs whose layers have experts: importable, because spawned processes find their work by name."""

import shutil
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from nsa_dist.train import loop
from nsa_dist.train.config import TrainConfig
from train_cases import FORK_STEP, StopAfter, run, small_config

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
OF_FOUR = ("CP4", "TP2, CP2")
RUNS = [
    *(("experts", layout) for layout in LAYOUTS),
    *(("shared", layout) for layout in ("CP2", "TP2", "PP2", "TP2, CP2")),
    *(("packed", layout) for layout in PACKED_LAYOUTS),
]


def layout_of(name: str, layout: str) -> dict:
    return (PACKED_LAYOUTS if name == "packed" else LAYOUTS)[layout]


def config(base: Path, folder: str, name: str, **sections: dict) -> TrainConfig:
    lengths = {"steps": STEPS, "eval_interval": STEPS, "checkpoint_interval": STEPS, **sections.pop("run", {})}
    model = {**MODELS.get(name, EXPERTS), **sections.pop("model", {})}
    data = {"documents": "packed"} if name == "packed" else {}
    sections["optimizer"] = {"adam_eps": 2e-5}  # docs/decisions/tiny-job.md: at 1e-8 rounding moves weights
    return small_config(base, folder, model=model, run=lengths, data=data, **sections)


def alone(rank: int, base: Path) -> None:
    """Each model to the end by one process, which stopped on the way."""
    for name in (*MODELS, "packed"):
        run(config(base, f"{name} fork", name), StopAfter(FORK_STEP))
        shutil.copytree(base / f"{name} fork", base / name)
        run(config(base, name, name).resuming())


def over_ranks(rank: int, base: Path, runs: list[tuple[str, str]]) -> None:
    """The forks to the end, each in its layout."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        for name, layout in runs:
            folder = f"{name} {layout}"
            if rank == 0:
                shutil.copytree(base / f"{name} fork", base / folder)
            dist.barrier()
            run(config(base, folder, name, **layout_of(name, layout)).resuming())
