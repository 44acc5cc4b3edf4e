"""What context parallelism costs where people train: few tokens a rank, every transport, interleaved, host and device.

instant     the kernels of the same share with nothing moved: what is above it is what context parallelism adds
eager       the calls as a training step makes them; host time is until the last of them is queued
captured    forward and backward replayed as one CUDA graph, where nothing waits for a host
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nsa_dist.attention import default_ops
from nsa_dist.bench.case import Case
from nsa_dist.bench.instant import InstantComm
from nsa_dist.bench.layer import layer_forward
from nsa_dist.bench.measure import elapsed, mark
from nsa_dist.bench.selection import Replay, with_selection
from nsa_dist.bench.shard import drawn, make_shard
from nsa_dist.bench.world import World
from nsa_dist.cp.comm import Comm

INSTANT = "instant"


@dataclass(frozen=True)
class Everyday:
    """One length and head size in several ways on every rank of its group, in turn, `repeats` times."""

    cases: tuple[Case, ...]  # of one length, group and head size
    repeats: int
    captured: bool = True

    def __call__(self, world: World) -> list[dict[str, Any]] | None:
        if world.rank >= self.cases[0].cp_size:
            return None
        group = world.comm(self.cases[0].cp_size)
        runs: dict[tuple[str, str], _Run] = {}
        for case in self.cases:
            fetches = not case.gathers and case.transport == "one_sided"
            runs[case.way, "eager"] = _Run(case, world, replace(group))
            if fetches:
                runs[f"{INSTANT}, {case.way}", "eager"] = _Run(case, world, None)
        for key, run in list(runs.items()):
            run()
            run()
            if self.captured and (key[0].startswith(INSTANT) or "one_sided" in key[0]) and world.place.device == "cuda":
                runs[key[0], "captured"] = _Captured(run)
        for _ in range(self.repeats):
            for run in runs.values():
                group.agree(0)
                run.time()
        return [{"way": way, "how": how, **run.row()} for (way, how), run in runs.items()]


class _Run:
    """Forward and backward of a case, timed."""

    def __init__(self, case: Case, world: World, comm: Comm | None) -> None:
        plan, self._device = case.plan(), world.device
        self._shard = make_shard(case, plan.tokens_per_rank, world.device, seed=world.rank)
        comm = comm or InstantComm.of(world.rank, case.cp_size, world.device)
        self._ids = drawn(case, world.rank, world.device).block_indices
        ops = with_selection(default_ops(self._shard.q), Replay(self._ids))
        self._forward = layer_forward(case, self._shard, comm, ops)
        self._forward_s: list[float] = []
        self._backward_s: list[float] = []
        self._host_s: list[float] = []

    def __call__(self) -> Sequence[Tensor]:
        return torch.autograd.grad(self._forward(), self._shard.leaves, self._shard.grad_out)

    def time(self) -> None:
        begin, marks = time.perf_counter(), [mark(self._device)]
        out = self._forward()
        marks.append(mark(self._device))
        torch.autograd.grad(out, self._shard.leaves, self._shard.grad_out)
        marks.append(mark(self._device))
        self._host_s.append(time.perf_counter() - begin)
        forward_s, backward_s = elapsed(marks)
        self._forward_s.append(forward_s)
        self._backward_s.append(backward_s)

    def row(self) -> dict[str, float]:
        total = [f + b for f, b in zip(self._forward_s, self._backward_s, strict=True)]
        return {
            "forward_s": median(self._forward_s),
            "backward_s": median(self._backward_s),
            "total_s": median(total),
            "host_s": median(self._host_s),
        }


class _Captured(_Run):
    """The same as one CUDA graph."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._total_s: list[float] = []
        self._host_s: list[float] = []
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = run()

    def time(self) -> None:
        begin, marks = time.perf_counter(), [mark(self._run._device)]
        self._graph.replay()
        marks.append(mark(self._run._device))
        self._host_s.append(time.perf_counter() - begin)
        self._total_s += elapsed(marks)

    def row(self) -> dict[str, float]:
        return {"total_s": median(self._total_s), "host_s": median(self._host_s)}


def profile(run: Callable[[], object], steps: int = 3) -> dict[str, Any]:
    """How a run's time divides between host and device: seconds a run, and the longest of both by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    run()
    torch.cuda.synchronize()
    with watch(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        begin = time.perf_counter()
        for _ in range(steps):
            run()
        host_s = time.perf_counter() - begin
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - begin
    events = found.key_averages()
    device = {e.key: e.self_device_time_total / 1e6 / steps for e in events if e.self_device_time_total > 0}
    host = {e.key: e.self_cpu_time_total / 1e6 / steps for e in events if e.self_cpu_time_total > 0}
    return {"wall_s": wall_s / steps, "host_s": host_s / steps, "device_s": device, "host_by_name_s": host}
