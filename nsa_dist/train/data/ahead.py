"""The next step's first micro-batches, made on the host while the device is still busy with this step.

Sample n is a function of n, so what is made ahead is a guess about which batch is asked for next, never about what is
in it: where a run leaves samples out or goes back, what was made for nothing is dropped and the right one made.

In the training thread, neither a thread nor processes of its own: docs/decisions/host-time.md.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from nsa_dist.train.data.batches import Batch, BatchCutter, HostBatch
from nsa_dist.train.data.packs import KEPT, Pack
from nsa_dist.train.data.samples import SampleSource

_MOST = 4  # micro-batches: those behind them are made while the device computes these


@dataclass
class Ahead:
    """Its `micro_batches(first)` are those of the cutter, in order; `make` makes some of the next step's.

    `end` is the number of the first sample that the run will not need: none from there on is drawn before it is asked
    for. What cannot be made ahead is left to the step that needs it, which raises its error.
    """

    cutter: BatchCutter
    samples: SampleSource
    end: int
    _next: int = field(default=0, init=False, repr=False)  # first sample of the step behind the newest
    _made: deque[tuple[range, HostBatch]] = field(default_factory=deque, init=False, repr=False)
    _planned: deque[tuple[int, ...]] = field(default_factory=lambda: deque(maxlen=KEPT), init=False, repr=False)

    def micro_batches(self, first: int) -> Iterator[Batch]:
        """As `BatchCutter.micro_batches` of the samples from number `first` on."""
        self._next = first + self.cutter.config.run.global_batch_size
        return self.cutter.placed(map(self._taken, self.cutter.numbers(first)))

    def make(self) -> None:
        """The host's part of the next step's: where all of this step is launched and the host is about to wait."""
        self._made.clear()
        if self._next >= self.end:
            return
        with suppress(Exception):  # it comes again where the batch is asked for
            for numbers in islice(self.cutter.numbers(self._next), _MOST):
                self._made.append((numbers, self._host_batch(numbers)))

    def _taken(self, numbers: range) -> HostBatch:
        if self._made and self._made[0][0] == numbers:
            return self._made.popleft()[1]
        self._made.clear()
        return self._host_batch(numbers)

    def _host_batch(self, numbers: range) -> HostBatch:
        return self.cutter.host_batch(self.samples, numbers, self._plan)

    def _plan(self, bounds: tuple[int, ...]) -> Pack | None:
        """Not of bounds that came just before, whose pack is kept."""
        is_new, packer = bounds not in self._planned, self.cutter.packer
        self._planned.append(bounds)
        return packer.plan(bounds) if is_new and packer is not None else None
