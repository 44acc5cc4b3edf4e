"""Medians of device time, peak memory, and the two ceilings of the device."""

from collections.abc import Callable

import torch
from torch import Tensor

Row = dict[str, float | str]


class Timer:
    """Times functions by device events, the caches flushed before each run."""

    def __init__(self, seconds: float, max_runs: int = 50, long_s: float = 0.7) -> None:
        """Each measurement runs for about `seconds`: 3 to `max_runs` times, once where a run takes `long_s` or more."""
        self.seconds, self.max_runs, self.long_s = seconds, max_runs, long_s
        self._flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")  # 256 MiB, past any L2

    def median_ms(self, function: Callable[..., object], before: Callable[[], object] | None = None) -> float:
        """Of the runs after the first, which warms up. `before` gives each its argument, untimed."""
        times = self._times_ms(function, before)
        return times[len(times) // 2]

    def row(
        self, direction: str, function: Callable[..., object], before: Callable[[], object] | None = None
    ) -> dict[str, float]:
        """`DIRECTION_ms`, the median, and `DIRECTION_spread_ms`, half the distance of the quartiles; not of one run."""
        times = self._times_ms(function, before)
        row = {f"{direction}_ms": times[len(times) // 2]}
        if len(times) > 1:
            row[f"{direction}_spread_ms"] = (times[3 * len(times) // 4] - times[len(times) // 4]) / 2
        return row

    def _times_ms(self, function: Callable[..., object], before: Callable[[], object] | None) -> list[float]:
        """Ascending."""
        first = self._run(function, before) / 1000
        runs = 1 if first >= self.long_s else max(3, min(self.max_runs, int(self.seconds / max(first, 1e-6))))
        return sorted(self._run(function, before) for _ in range(runs))

    def _run(self, function: Callable[..., object], before: Callable[[], object] | None) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        given = () if before is None else (before(),)
        self._flush.zero_()
        begin.record()
        function(*given)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def peak_gib(forward: Callable[[], Tensor], gradients: Callable[[Tensor], tuple[Tensor, ...]]) -> float:
    """Peak memory of `gradients(forward())` over what is there before, and over its own output and gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = forward()
    grads = gradients(out)
    torch.cuda.synchronize()
    held = sum(t.numel() * t.element_size() for t in (out, *grads))
    return (torch.cuda.max_memory_allocated() - before - held) / 2**30


def ceilings(timer: Timer) -> dict[str, float]:
    """What this device does at best: bytes read plus written by a copy, and bf16 products."""
    source = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_ms = timer.median_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_ms = timer.median_ms(lambda: a @ b)
    return {"copy_TB_per_s": 2 * 2**32 / copy_ms / 1e9, "bf16_TFLOP_per_s": 2 * 8192**3 / product_ms / 1e9}


def time_both(timer: Timer, forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Row, bool]:
    """Times and peak memory, and whether two backward runs gave gradients that differ in any bit, or are not finite."""
    runs: list[tuple[Tensor, ...]] = []

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        runs[1:] = [torch.autograd.grad(out, leaves, grad)]
        return runs[-1]

    row: Row = {"peak_gib": peak_gib(forward, backward), **timer.row("forward", forward)}
    row |= timer.row("backward", backward, before=forward)
    same = all(bool(a.isfinite().all()) and torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    return row, not same
