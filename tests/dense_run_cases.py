"""Runs whose layers are dense or of both kinds: importable, because spawned processes find their work by name."""

import shutil
from pathlib import Path

from nsa_dist.train.config import TrainConfig
from train_cases import FORK_STEP, StopAfter, copied, run, small_config

STEPS = FORK_STEP + 20
MODELS: dict[str, str | list[str]] = {"dense": "dense", "both": ["nsa", "dense"]}
LAYOUTS: dict[str, dict] = {
    "TP2": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}},
}

RUNS = [("dense", "TP2"), ("both", "TP2"), ("both", "PP2")]


def config(base: Path, name: str, attention: str | list[str], **sections: dict) -> TrainConfig:
    model = {"attention": attention, **sections.pop("model", {})}
    lengths = {
        "health_interval": STEPS // 2, "steps": STEPS, "eval_interval": STEPS, "checkpoint_interval": STEPS,
    }  # fmt: skip
    sections["optimizer"] = {"adam_eps": 2e-5}  # docs/decisions/tiny-job.md: at 1e-8 rounding moves weights
    return small_config(base, name, model=model, run=lengths, **sections)


def alone(rank: int, base: Path) -> None:
    """Each model to the end by one process, which stopped on the way."""
    for name, attention in MODELS.items():
        run(config(base, f"{name} fork", attention), StopAfter(FORK_STEP))
        shutil.copytree(base / f"{name} fork", base / name)
        run(config(base, name, attention).resuming())


def pair(rank: int, base: Path) -> None:
    """The forks to the end by two processes, in every layout."""
    for name, layout in RUNS:
        folder = f"{name} {layout}"
        copied(rank, base / f"{name} fork", base / folder)
        run(config(base, folder, MODELS[name], **LAYOUTS[layout]).resuming())
