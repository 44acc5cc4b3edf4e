"""Runs with batches made ahead and without: importable, because spawned processes find their work by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from nsa_dist.train import loop
from nsa_dist.train.data.ahead import Ahead
from pack_run_cases import write_documents
from train_cases import StopAfter, run, small_config


class NotAhead(Ahead):
    """Every batch is made when it is asked for."""

    def make(self):
        pass


@contextmanager
def undrawn() -> Iterator[None]:
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        yield


def config(base: Path, name: str, documents: str, world_size: int, **run_keys: int):
    tasks = {"tasks": {"copy": 0.25, "needle": 0.25}, "task_lengths": [256]}
    return small_config(
        base, name, parallel={"context_parallel_size": world_size}, data={"documents": documents, **tasks},
        run=run_keys,
    )  # fmt: skip


def ahead_and_not(rank: int, base: Path) -> None:
    """Runs of packed and whole documents with tasks, over two ranks: "without", "ahead", "resumed", "seldom" logged."""
    if rank == 0:
        write_documents(base / "texts")
    dist.barrier()
    with undrawn():
        for documents in ("packed", "whole"):
            with patch.object(loop, "Ahead", NotAhead):
                run(config(base, f"{documents} without", documents, 2))
            run(config(base, f"{documents} ahead", documents, 2))
            run(config(base, f"{documents} resumed", documents, 2), StopAfter(3))
            run(config(base, f"{documents} resumed", documents, 2).resuming())
            run(config(base, f"{documents} seldom", documents, 2, log_interval=4))
