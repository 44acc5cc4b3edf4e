"""Runs on packed documents: importable, because spawned processes find their work by name."""

import random
import shutil
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from nsa_dist.train import loop
from nsa_dist.train.config import TrainConfig
from train_cases import StopAfter, run, small_config

STEPS, FORK_STEP = 22, 2
ORDERS: dict[str, dict] = {
    "the row in a zigzag": {"layout": "zigzag"},
    "each document in a zigzag": {"layout": "zigzag", "pack_order": "documents"},
    "the row in chunks": {"layout": "contiguous"},
}


def write_documents(folder: Path, num_files: int = 60, seed: int = 0) -> None:
    """Of 1 to 400 bytes, which no block length divides."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for i in range(num_files):
        text = "".join(f"{i} and {j} are {i + j}\n" for j in range(30))
        (folder / f"{i:02}.txt").write_text(text[: draw.choice([1, 5, 40, 150, 400])])


def config(base: Path, name: str, parallel: dict | None = None, **sections: dict) -> TrainConfig:
    lengths = {
        "steps": STEPS, "checkpoint_interval": STEPS, "eval_interval": STEPS, "health_interval": 11,
        **sections.pop("run", {}),
    }  # fmt: skip
    # At 1e-8 Adam moves weights whose gradients are rounding as fast as others (docs/decisions/tiny-job.md).
    sections["optimizer"] = {"adam_eps": 2e-5, **sections.get("optimizer", {})}
    sections["data"] = {"documents": "packed", **sections.get("data", {})}
    return small_config(base, name, parallel=parallel or {}, run=lengths, **sections)


def alone(rank: int, base: Path) -> None:
    run(config(base, "fork"), StopAfter(FORK_STEP))
    shutil.copytree(base / "fork", base / "one")
    run(config(base, "one").resuming())


def over_ranks(rank: int, base: Path, size: int) -> None:
    """The fork to the end over context-parallel ranks, in every order."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        for order, parallel in ORDERS.items():
            name = f"{size} ranks, {order}"
            if rank == 0:
                shutil.copytree(base / "fork", base / name)
            dist.barrier()
            run(config(base, name, {"context_parallel_size": size, **parallel}).resuming())
