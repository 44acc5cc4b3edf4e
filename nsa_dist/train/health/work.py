"""How long each rank works in a step, its waiting for others taken off.

All ranks take the same time for a step, as each waits for the slowest. What tells them apart is the time that a rank
does not spend in waits for collectives: every wait of torch.distributed, whoever called it, is measured for one step
in `run.health_interval`. On a GPU it is the time that the stream which computes stands still for it, between two
events, and not that of the host. A wait contains the transfer itself, which a rank's own work does not.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Work:
    """Of one rank and step. `work_s` is there when the step is over."""

    device: torch.device
    work_s: float = 0.0
    waited_s: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around a step."""
        self._finish_device()
        start = time.perf_counter()
        with self._waits_seen():
            yield
        self._finish_device()
        step_s = time.perf_counter() - start
        self.waited_s += sum(begun.elapsed_time(ended) for begun, ended in self.events) / 1e3
        self.work_s = max(0.0, step_s - self.waited_s)

    @contextmanager
    def _waits_seen(self) -> Iterator[None]:
        """torch.distributed's functions call `wait` of what they started; so does all that is waited for later."""
        wait: Callable[..., Any] = dist.Work.wait

        def timed(work: dist.Work, *arguments: Any) -> Any:
            with self._wait():
                return wait(work, *arguments)

        setattr(dist.Work, "wait", timed)  # noqa: B010 - a class of C++
        try:
            yield
        finally:
            setattr(dist.Work, "wait", wait)  # noqa: B010

    @contextmanager
    def _wait(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            ended.record()
            self.events.append((begun, ended))
            return
        start = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - start

    def _finish_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
