"""The next micro-batches, made on the host in one thread while the current one is computed.

Sample n is a function of n, so what is made ahead is a guess about which batch is asked for next, never about what is
in it: where a run leaves samples out or goes back, what was made for nothing is dropped and the right one made. The
host's part alone is made here; the device, its streams and the other ranks belong to the thread that trains.

A thread, not processes (`torch.utils.data.DataLoader`): docs/decisions/host-time.md.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, islice

from nsa_dist.train.data.batches import Batch, BatchCutter, HostBatch
from nsa_dist.train.data.packs import KEPT, Pack
from nsa_dist.train.data.samples import SampleSource

_MOST = 4  # micro-batches that lie ready: a small step's, and of a large one what evens out


@dataclass
class Ahead:
    """In `with Ahead(cutter, samples, end) as ahead:` its `micro_batches(first)` are those of the cutter, in order.

    `end` is the number of the first sample that the run will not need: none from there on is drawn before it is asked
    for.

    What goes wrong in the thread is raised where that batch is asked for, as it was raised there; what nobody asks for
    is not. At the end of the block the thread is gone, however the block ends.
    """

    cutter: BatchCutter
    samples: SampleSource
    end: int
    _thread: ThreadPoolExecutor = field(init=False, repr=False)
    _coming: Iterator[range] = field(default_factory=lambda: iter(()), init=False, repr=False)  # behind what is pending
    _pending: deque[tuple[range, Future[HostBatch]]] = field(default_factory=deque, init=False, repr=False)
    _planned: deque[tuple[int, ...]] = field(default_factory=lambda: deque(maxlen=KEPT), init=False, repr=False)

    def __enter__(self) -> "Ahead":
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="samples-ahead")
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)  # waits for what is being made, a micro-batch at most
        self._pending.clear()

    def micro_batches(self, first: int) -> Iterator[Batch]:
        """As `BatchCutter.micro_batches` of the samples from number `first` on."""
        if not self._pending or self._pending[0][0] != next(self.cutter.numbers(first)):
            self._begin_at(first)
        return self.cutter.placed(self._next() for _ in range(self.cutter.num_micro_batches))

    def settle(self) -> None:
        """Wait until the thread rests: a process that is forked meanwhile would never see its locks released."""
        wait([made for _, made in self._pending])

    def _begin_at(self, first: int) -> None:
        for _, made in self._pending:
            made.cancel()
        self._pending.clear()
        size = self.cutter.config.run.global_batch_size
        steps = range(first, max(self.end, first + size), size)
        self._coming = chain.from_iterable(map(self.cutter.numbers, steps))
        self._fill()

    def _next(self) -> HostBatch:
        _, made = self._pending.popleft()
        self._fill()
        return made.result()

    def _fill(self) -> None:
        for numbers in islice(self._coming, _MOST - len(self._pending)):
            self._pending.append((numbers, self._thread.submit(self._make, numbers)))

    def _make(self, numbers: range) -> HostBatch:
        """In the thread."""
        return self.cutter.host_batch(self.samples, numbers, self._plan)

    def _plan(self, bounds: tuple[int, ...]) -> Pack | None:
        """Not of bounds that came just before, whose pack is kept."""
        is_new, packer = bounds not in self._planned, self.cutter.packer
        self._planned.append(bounds)
        return packer.plan(bounds) if is_new and packer is not None else None
