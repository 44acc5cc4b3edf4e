"""Runs that predict more than the next token: importable, because spawned processes find their work by name."""

import shutil
from pathlib import Path
from unittest.mock import patch

from nsa_dist.train import loop
from nsa_dist.train.config import TrainConfig
from train_cases import FORK_STEP, StopAfter, copied, run, small_config

STEPS = FORK_STEP + 20
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.05, "moe_layer_freq": [0, 1]}
MODELS: dict[str, dict] = {
    "one": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3},
    "two, tied": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3, "tie_embeddings": True},
    "packed": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3},
    "experts": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3, **EXPERTS},
    "hybrid": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3, "attention": ["nsa", "dense"]},
}
_TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict] = {
    "CP2": {"parallel": {"context_parallel_size": 2}},
    "CP2 contiguous": {"parallel": {"context_parallel_size": 2, "layout": "contiguous"}},
    "CP2 by documents": {"parallel": {"context_parallel_size": 2, "pack_order": "documents"}},
    "TP2": {"parallel": {"tensor_model_parallel_size": 2}},
    "TP2 SP": {"parallel": _TENSOR},
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "DP2": {},
    "DP2 in four": {"run": {"micro_batch_size": 1}},
    "CP4": {"parallel": {"context_parallel_size": 4}},
    "TP2 SP, CP2": {"parallel": {**_TENSOR, "context_parallel_size": 2}},
    "PP2, CP2": {"parallel": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}},
}
OF_FOUR = ("CP4", "TP2 SP, CP2", "PP2, CP2")
RUNS = [
    *(("one", layout) for layout in LAYOUTS if layout != "CP2 by documents"),
    *(("two, tied", layout) for layout in ("CP2", "TP2 SP", "PP2")),
    *(("packed", layout) for layout in ("CP2", "CP2 contiguous", "CP2 by documents", "PP2", "DP2 in four", "CP4")),
    *(("experts", layout) for layout in ("CP2", "TP2 SP", "PP2")),
    *(("hybrid", layout) for layout in ("TP2 SP", "PP2")),
]
BACK = [("one", "TP2 SP"), ("two, tied", "PP2")]  # and back to one process


def config(base: Path, folder: str, name: str, **sections: dict) -> TrainConfig:
    lengths = {
        "steps": STEPS, "eval_interval": STEPS, "checkpoint_interval": STEPS, "replica_check_interval": STEPS // 2,
        "health_interval": STEPS, **sections.pop("run", {}),
    }  # fmt: skip
    model = {**MODELS[name], **sections.pop("model", {})}
    data = {"documents": "packed"} if name == "packed" else {}
    sections.setdefault("optimizer", {"adam_eps": 2e-5})  # docs/decisions/tiny-job.md: at 1e-8 rounding moves weights
    return small_config(base, folder, model=model, run=lengths, data=data, **sections)


def alone(rank: int, base: Path, names: list[str]) -> None:
    """Each model to the end by one process, which stopped on the way."""
    for name in names:
        run(config(base, f"{name} fork", name), StopAfter(FORK_STEP))
        shutil.copytree(base / f"{name} fork", base / name)
        run(config(base, name, name).resuming())


def over_ranks(rank: int, base: Path, runs: list[tuple[str, str]]) -> None:
    """The forks to the end, each in its layout."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        for name, layout in runs:
            folder = f"{name} {layout}"
            copied(rank, base / f"{name} fork", base / folder)
            run(config(base, folder, name, **LAYOUTS[layout]).resuming())
