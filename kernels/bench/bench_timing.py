"""Medians of device time, peak memory, and the two ceilings of the device."""

from collections.abc import Callable

import torch
from torch import Tensor


class Timer:
    """Times functions by device events, the caches flushed before each run."""

    def __init__(self, seconds: float, max_runs: int = 50) -> None:
        """Each measurement runs for about `seconds`, at least 3 and at most `max_runs` times."""
        self.seconds, self.max_runs = seconds, max_runs
        self._flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")  # 256 MiB, past any L2

    def median_ms(self, function: Callable[[], object]) -> float:
        function()
        first = self._run(function)
        runs = max(3, min(self.max_runs, int(self.seconds * 1000 / max(first, 1e-3))))
        times = sorted(self._run(function) for _ in range(runs))
        return times[len(times) // 2]

    def _run(self, function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def peak_gib(forward: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    """Peak memory of one forward and backward over inputs, output, its gradient and the gradients of `leaves`."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = forward()
    grad = torch.ones_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    torch.cuda.synchronize()
    held = sum(t.numel() * t.element_size() for t in (out, grad, *grads))
    return (torch.cuda.max_memory_allocated() - before - held) / 2**30


def ceilings(timer: Timer) -> dict[str, float]:
    """What this device does at best: bytes read plus written by a copy, and bf16 products."""
    source = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_ms = timer.median_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_ms = timer.median_ms(lambda: a @ b)
    return {"copy_TB_per_s": 2 * 2**32 / copy_ms / 1e9, "bf16_TFLOP_per_s": 2 * 8192**3 / product_ms / 1e9}
