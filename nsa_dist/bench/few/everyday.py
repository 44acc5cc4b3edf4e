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

from nsa_dist.bench.case import Case
from nsa_dist.bench.few.instant import InstantComm
from nsa_dist.bench.layer import layer_forward
from nsa_dist.bench.measure import elapsed, mark
from nsa_dist.bench.selection import Replay, with_selection
from nsa_dist.bench.shard import drawn, make_shard
from nsa_dist.bench.world import World
from nsa_dist.cp.comm import Comm
from nsa_dist.operators import default_ops

INSTANT = "instant"


@dataclass(frozen=True)
class Everyday:
    """One length and head size in several ways on every rank of its group, in turn, `repeats` times."""

    cases: tuple[Case, ...]  # of one length, group and head size
    repeats: int
    divides: bool = False  # say of the eager runs how their time divides, too

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
            if "one_sided" in key[0] and world.place.device == "cuda":
                runs[key[0], "captured"] = _Captured(run)
        for _ in range(self.repeats):
            for run in runs.values():
                group.agree(0)
                run.time()
        rows = [{"way": way, "how": how, **run.row()} for (way, how), run in runs.items()]
        if self.divides and world.place.device == "cuda":
            for row, run in zip(rows, runs.values(), strict=True):
                if row["how"] == "eager" and not row["way"].startswith(INSTANT):
                    row["divided"] = divided(run)
        return rows


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

    def row(self) -> dict[str, Any]:
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

    def row(self) -> dict[str, Any]:
        return {"total_s": median(self._total_s), "host_s": median(self._host_s)}


# Of what the profiler names on the host, in this order.
_HOST = {
    "waits for the device": ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize"),
    "launches and copies": ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaEvent", "cudaStream"),
    "torch's operators and collectives": ("aten::", "c10d::", "record_param_comms", "nccl:"),
    "Python, autograd and the rest": ("",),
}
_EXCHANGES = ("nccl", "_meet", "_put", "_take", "_copy_kernel", "_add_kernel", "_add_gradients", "_mark_kernel")


def divided(run: Callable[[], object], steps: int = 3) -> dict[str, Any]:
    """How a run's seconds divide on its host, and what its device works meanwhile. The profiler itself takes time, too.

    The kernels of an exchange include what they wait for other ranks.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        begin = time.perf_counter()
        for _ in range(steps):
            run()
        host_s = time.perf_counter() - begin
        torch.cuda.synchronize()
    host, device = dict.fromkeys(_HOST, 0.0), {"the layer's kernels": 0.0, "kernels of exchanges": 0.0}
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:
            part = next(p for p, names in _HOST.items() if event.key.startswith(names))
            host[part] += event.self_cpu_time_total / 1e6 / steps
        elif not event.key.startswith("nccl:"):
            exchanges = event.key.startswith(_EXCHANGES)
            device[list(device)[exchanges]] += event.self_device_time_total / 1e6 / steps
    return {"host_s": host_s / steps, "host": host, "device": device}
