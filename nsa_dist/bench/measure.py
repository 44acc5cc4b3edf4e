"""Time, parts, bytes and memory of one layer, forward and backward, on one rank."""

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nsa_dist.bench.shard import Shard
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.trace import Span, Trace


@dataclass(frozen=True)
class Measured:
    """Times are medians over the runs, the others are of the last. Memory is None on a CPU, where nothing counts it."""

    forward_s: float
    backward_s: float
    parts_s: dict[str, float]  # `forward.cmp`: computed; `forward.wait`: waited for collectives, nothing computed
    sent_bytes: dict[str, int]  # by kind, forward and backward
    inputs_bytes: int | None  # allocated before the forward: inputs and the gradient of the output
    forward_peak_bytes: int | None  # in all, inputs counted
    peak_bytes: int | None  # of forward and backward


def measure(
    forward: Callable[[], Tensor], shard: Shard, comm: Comm, *, repeats: int = 3, ready: Callable[[], object] = int
) -> Measured:
    """Run `forward` and its backward `repeats` times after one to warm up; once if `repeats` is 0, for memory alone.

    comm        the one that `forward` uses

    ready       called before every run: over ranks a barrier, so that nobody is waited for who started late
    """
    runs = [_run(forward, shard, comm, ready) for _ in range(1 + repeats)][min(1, repeats) :]
    last = runs[-1]
    return Measured(
        median(run.forward_s for run in runs),
        median(run.backward_s for run in runs),
        last.parts_s,
        last.sent_bytes,
        last.inputs_bytes,
        last.forward_peak_bytes,
        last.peak_bytes,
    )


def new_trace(device: torch.device) -> Trace:
    return Trace(device_times=device.type == "cuda")


def _run(forward: Callable[[], Tensor], shard: Shard, comm: Comm, ready: Callable[[], object]) -> Measured:
    device, on_gpu = shard.q.device, shard.q.is_cuda
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    inputs_bytes = torch.cuda.memory_allocated() if on_gpu else None
    ready()
    comm.traffic.sent_bytes.clear()
    if comm.trace is not None:
        comm.trace.events.clear()
    marks = [mark(device)]
    comm.enter("forward")
    out = forward()
    marks.append(mark(device))
    forward_peak = torch.cuda.max_memory_allocated() if on_gpu else None
    comm.enter("backward")
    torch.autograd.grad(out, shard.leaves, shard.grad_out)
    marks.append(mark(device))
    forward_s, backward_s = elapsed(marks)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    parts = parts_of(comm.trace.spans()) if comm.trace else {}
    return Measured(forward_s, backward_s, parts, dict(comm.traffic.sent_bytes), inputs_bytes, forward_peak, peak)


def parts_of(spans: list[Span]) -> dict[str, float]:
    """Seconds by phase and kind of what was computed, and by phase of what was waited for."""
    parts: dict[str, float] = defaultdict(float)
    for span in spans:
        if span.what != "transfer":
            kind = "wait" if span.what == "wait" else span.kind
            parts[f"{span.phase}.{kind}"] += span.end_s - span.begin_s
    return dict(parts)


def mark(device: torch.device) -> Any:
    """A point in time: an event on the current stream of a GPU, else the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(marks: list[Any]) -> list[float]:
    """Seconds from each mark to the next; waits for the device."""
    if isinstance(marks[0], float):
        return [b - a for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
