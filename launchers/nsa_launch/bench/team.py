"""Processes that measure together, one a rank, and their end when one of them cannot go on.

A rank that runs out of memory leaves the others waiting in a collective that never completes. So every task has one
outcome for all: the first failure, a silence or the end of the time allowed ends every process, and the next task
starts a new team. That costs seconds, and no state of a broken group survives.
"""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from nsa_dist.bench.world import Place, World

Task = Callable[[World], Any]
_GRACE_S = 3.0  # for the others' messages, once one rank has failed


class TaskFailed(RuntimeError):
    """A task that did not end well on every rank; says why."""


class Team:
    """Starts its processes when they are first needed, and again after a failure. Close it, or use `with`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._members: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, task: Task, timeout_s: float) -> list[Any]:
        """`task(world)` on every rank; their results by rank. Tasks and results must pickle.

        Raises TaskFailed if a rank raises, dies or is not done in time; then no process of the team is left.
        """
        until = time.monotonic() + timeout_s
        if not self._members:
            self._start()
        for _, pipe in self._members:
            pipe.send(task)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) < self.place.num_ranks:
            pending: dict[Any, int] = {
                pipe: r for r, (_, pipe) in enumerate(self._members) if r not in results and r not in failures
            }
            ready: list[Any] = wait(list(pending), timeout=max(0.0, until - time.monotonic())) if pending else []
            for one in ready:
                self._receive(pending[one], one, results, failures)
            if failures and until > time.monotonic() + _GRACE_S:
                until = time.monotonic() + _GRACE_S
            if not ready:
                self._stop()
                raise TaskFailed(_told(failures, results, self.place.num_ranks, timeout_s))
        return [results[rank] for rank in range(self.place.num_ranks)]

    def close(self) -> None:
        """Let idle processes end by themselves."""
        for _, pipe in self._members:
            pipe.send(None)
        for process, _ in self._members:
            process.join(timeout=20)
        self._stop()

    def _receive(self, rank: int, pipe: Any, results: dict[int, Any], failures: dict[int, str]) -> None:
        try:
            done, value = pipe.recv()
        except EOFError:
            process = self._members[rank][0]
            process.join(timeout=5)
            done, value = False, f"the process ended with exit code {process.exitcode}"
        (results if done else failures)[rank] = value

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = f"file://{self._folder.name}/meet"
        for rank in range(self.place.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.place, meeting, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            self._members.append((process, ours))

    def _stop(self) -> None:
        for process, pipe in self._members:
            process.kill()
            process.join()
            pipe.close()
        self._members = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _told(failures: dict[int, str], results: dict[int, Any], num_ranks: int, timeout_s: float) -> str:
    if failures:
        rank, message = min(failures.items())
        others = f" ({len(failures)} of {num_ranks} ranks)" if len(failures) > 1 else ""
        return f"rank {rank}: {message}{others}"
    silent = sorted(set(range(num_ranks)) - set(results))
    return f"not done after {timeout_s:.0f} s on ranks {silent}"


def _work(rank: int, place: Place, meeting: str, pipe: Connection) -> None:
    """What a process of the team does: join the group, then one task after the other until told to end."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    if place.device == "cuda":
        torch.cuda.set_device(place.of(rank))
    device_id = place.of(rank) if place.backend == "nccl" else None
    dist.init_process_group(
        place.backend, init_method=meeting, rank=rank, world_size=place.num_ranks, device_id=device_id
    )
    world = World(rank, place, _groups(place.num_ranks))
    while (task := pipe.recv()) is not None:
        try:
            pipe.send((True, task(world)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, _one_line(error)))
        if place.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # the next task begins with the whole GPU
    dist.destroy_process_group()


def _one_line(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"out of memory: {str(error).splitlines()[0]}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _groups(num_ranks: int) -> dict[int, dist.ProcessGroup]:
    """By size, the group of the first ranks: 1, powers of two, and all of them."""
    sizes = sorted({1, num_ranks} | {1 << i for i in range(1, num_ranks.bit_length()) if 1 << i <= num_ranks})
    return {size: dist.new_group(list(range(size))) for size in sizes}
