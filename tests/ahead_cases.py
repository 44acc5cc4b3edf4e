"""Runs with batches made ahead and without: importable, because spawned processes find their work by name."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from nsa_dist.train import loop
from nsa_dist.train.data.ahead import Ahead
from nsa_dist.train.data.samples import Samples
from nsa_dist.train.refused import Refused
from pack_run_cases import write_documents
from train_cases import StopAfter, run, small_config


class NotAhead(Ahead):
    """Every batch is made when it is asked for, by who asks."""

    def micro_batches(self, first):
        return self.cutter.micro_batches(self.samples, first)


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


def ends(rank: int, base: Path) -> dict[str, tuple[str, list[str]]]:
    """How runs ended, and which threads there were then that had not been there before."""
    write_documents(base / "texts")
    found, train_step, read, steps = {}, loop.train_step, Samples.__getitem__, []

    def failing(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise ZeroDivisionError("in step 3")
        return train_step(*arguments)

    def without_9(self, n):
        if n == 9 and threading.current_thread().name.startswith("samples-ahead"):
            raise Refused("sample 9 is not there")
        return read(self, n)

    def ended(name: str, hooks=None) -> None:
        error = ""
        try:
            run(small_config(base, name, data={"documents": "packed"}), hooks)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        found[name] = error, [t.name for t in threading.enumerate() if t.name.startswith("samples-ahead")]

    with undrawn():
        ended("the last step")
        ended("asked to stop", StopAfter(2))
        with patch.object(loop, "train_step", failing):
            ended("an error in a step")
        with patch.object(Samples, "__getitem__", without_9):
            ended("a sample that cannot be read")
    shutil.rmtree(base / "texts")
    return found
