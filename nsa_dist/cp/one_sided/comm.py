"""The collectives of `Comm` by mailboxes, and the exchange of pages: put, meet, take, on the side stream."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm, Handle
from nsa_dist.cp.device import Side
from nsa_dist.cp.one_sided.mailboxes import Mailboxes
from nsa_dist.cp.options import MOST_IN_LINE
from nsa_kernels.exchange.mailbox import Mailbox


class Queued:
    """What has been queued on the side stream so far."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """The current stream waits for it."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


@dataclass(frozen=True)
class OneSidedComm(Comm):
    """A group whose ranks read each other's memory. Sums over ranks are taken in the order of the ranks."""

    mailboxes: Mailboxes | None = field(default=None, repr=False)
    runs_in_line: bool = False
    most_in_line: int = MOST_IN_LINE  # elements of a call's queries

    @property
    def reads_memory(self) -> bool:
        return True

    @property
    def in_line(self) -> bool:
        return self.runs_in_line

    def for_call(self, q: Tensor) -> "OneSidedComm":
        """In line if the call is short. A trace is there to show what overlaps."""
        return replace(self, runs_in_line=q.numel() <= self.most_in_line and self.trace is None)

    @property
    def generation(self) -> int:
        return self.boxes.generation

    @property
    def boxes(self) -> Mailboxes:
        assert self.mailboxes is not None
        return self.mailboxes

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is queued inside goes to the side stream, behind all that the current one has now.

        In line it stays on the current stream.
        """
        if self.in_line:
            yield
            return
        side = Side(self.boxes.device)
        side.follow()
        with side.entered():
            yield

    def post_all_to_all(
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int], kind: str, name: str = "",
        most_sent: int | None = None,
    ) -> Handle:  # fmt: skip
        """As `Comm.post_all_to_all`; ValueError without `most_sent`, for slots are as large on every rank."""
        if self.size == 1:
            return Handle(x)
        if most_sent is None:
            raise ValueError(
                f"the all-to-all {kind!r} came without most_sent: over mailboxes every rank keeps room for what any of "
                f"them sends; pass the largest sum(send_sizes) of all ranks"
            )
        sent, out = x.contiguous(), x.new_empty(sum(recv_sizes), *x.shape[1:])
        row_bytes = x.shape[1:].numel() * x.element_size()
        label = self._count(kind, name, (sum(send_sizes) - send_sizes[self.rank]) * row_bytes)
        header = self.boxes.header_bytes()
        box = self.boxes.of(kind, header + most_sent * row_bytes)

        def take() -> None:
            self.boxes.copy_parts(box, out, self.boxes.begins(recv_sizes), row_bytes, header, shared=False)

        return Handle(
            out, self._exchange(box, sent, take, header, self.boxes.begins(send_sizes)), sent, label, self.trace
        )

    def _start_all_gather(self, out: Tensor, x: Tensor, kind: str) -> Queued | None:
        box = self.boxes.of(kind, x.nbytes)
        begins = self.boxes.begins([1] * self.size)
        return self._exchange(box, x, lambda: self.boxes.copy_parts(box, out, begins, x.nbytes, shared=True))

    def _start_reduce_scatter(self, out: Tensor, x: Tensor, kind: str) -> Queued | None:
        box = self.boxes.of(kind, x.nbytes)
        return self._exchange(box, x, lambda: self.boxes.sum_parts(box, out))

    def _exchange(
        self, box: Mailbox, x: Tensor, take: Callable[[], None], offset_bytes: int = 0, begins: Tensor | None = None
    ) -> Queued | None:
        with self.beside():
            self.boxes.put(box, x, offset_bytes, begins)
            self.boxes.meet(box)
            take()
            return self.queued()

    def queued(self) -> Queued | None:
        """What to wait for once `beside` is left; nothing in line."""
        return None if self.in_line else Queued(self.boxes.device)
