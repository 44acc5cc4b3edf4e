"""What was posted, what was computed and what was waited for, in the order of the program: a list that tests can read.

A collective leaves `post`, `wait` (somebody needs it) and `done` (it is there); a computation `begin` and `end`:

    post  halo                      the exchange is under way
    begin win[cover]                and this runs meanwhile
    end   win[cover]
    wait  halo                      only now somebody needs it
    done  halo

On a CPU a computation has ended when `end` is recorded. On a GPU it has been queued, so there each event takes the
time of its stream with a CUDA event, read after the fact: recording waits for nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Event:
    """One entry. `kind` is Traffic's kind of a collective, or the branch that computes; times in seconds."""

    action: str  # "post", "wait", "done", "begin" or "end"
    name: str  # distinguishes what is under way at once: "pages[2]", "cmp[0]"
    kind: str
    phase: str  # "forward" or "backward"
    num_bytes: int  # sent by this rank, on "post"; else 0
    host_s: float
    device_event: torch.cuda.Event | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Span:
    """From "begin" to "end" of a computation, "post" to "done" of a collective, "wait" to "done" of a wait for one."""

    what: str  # "compute", "transfer" or "wait"
    name: str
    kind: str
    phase: str
    num_bytes: int
    begin_s: float
    end_s: float


# What opens and what closes each sort of span.
_SPANS = {"compute": ("begin", "end"), "transfer": ("post", "done"), "wait": ("wait", "done")}


@dataclass
class Trace:
    """The events of one or more calls on one rank. Pass it to `nsa_attention`; without one nothing is recorded.

    device_times    take times from the GPU's streams; False: from the host's clock
    """

    device_times: bool = False
    phase: str = "forward"
    events: list[Event] = field(default_factory=list)

    def add(self, action: str, name: str, kind: str, num_bytes: int = 0) -> None:
        event = None
        if self.device_times:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.events.append(Event(action, name, kind, self.phase, num_bytes, time.perf_counter(), event))

    @contextmanager
    def span(self, name: str, kind: str) -> Iterator[None]:
        """A computation: what is queued inside of the block."""
        self.add("begin", name, kind)
        yield
        self.add("end", name, kind)

    def times_s(self) -> list[float]:
        """Seconds from the first event to each. With device times it waits for the device once."""
        if not self.device_times or not self.events:
            return [event.host_s - self.events[0].host_s for event in self.events]
        torch.cuda.synchronize()
        first = self.events[0].device_event
        return [first.elapsed_time(event.device_event) / 1e3 for event in self.events]  # type: ignore[union-attr, arg-type]

    def spans(self) -> list[Span]:
        """Every computation, transfer and wait that has ended, by its beginning."""
        found: list[Span] = []
        opened: dict[tuple[str, str, str], list[tuple[Event, float]]] = {}
        for event, time_s in zip(self.events, self.times_s(), strict=True):
            for what, (begin, end) in _SPANS.items():
                key = (what, event.name, event.phase)
                if event.action == begin:
                    opened.setdefault(key, []).append((event, time_s))
                elif event.action == end:
                    first, begin_s = opened[key].pop(0)
                    found.append(Span(what, event.name, event.kind, event.phase, first.num_bytes, begin_s, time_s))
        return sorted(found, key=lambda span: span.begin_s)
