"""Runs with tasks among their samples: importable, because spawned processes find their work by name."""

import shutil
from pathlib import Path

from nsa_dist.train.config import TrainConfig
from train_cases import StopAfter, copied, run, small_config

STEPS = 4

TASKS = {"recall": 0.25, "copy": 0.25}
LAYOUTS: dict[str, dict] = {
    "CP2": {"context_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "DP2": {},
}


def config(base: Path, name: str, **parallel: object) -> TrainConfig:
    data = {"folder": base / "texts", "validation_fraction": 0.25, "tasks": TASKS, "task_lengths": [256, 128]}
    lengths = {"steps": STEPS, "eval_interval": STEPS}
    return small_config(base, name, data=data, parallel=parallel, run=lengths)


def alone(rank: int, base: Path) -> None:
    run(config(base, "fork"), StopAfter(2))
    shutil.copytree(base / "fork", base / "alone")
    run(config(base, "alone").resuming())
    run(config(base, "undisturbed"))


def pair(rank: int, base: Path) -> None:
    for name, parallel in LAYOUTS.items():
        copied(rank, base / "fork", base / name)
        run(config(base, name, **parallel).resuming())
