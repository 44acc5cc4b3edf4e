"""The mailboxes of a group (`nsa_kernels.exchange`): one for each kind of exchange, as large as the largest yet.

Every exchange of a kind is put, met for and taken on one stream, the side stream, in the order of the program; kinds
do not wait for each other's slots. A box that has become too small is replaced and kept: captured graphs go on with it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.cp import comm
from nsa_dist.cp.device import put_on
from nsa_kernels.exchange import pages, parts, rows
from nsa_kernels.exchange.mailbox import Mailbox, aligned
from nsa_kernels.exchange.signals import meet

_MOST_BEGINS = 1024  # of packs that never come back


class Mailboxes:
    """Of rank `rank` of `size`, on `device`. Every rank asks for the same boxes in the same order.

    What is moved goes through the functions named here, so that a measurement can leave it out.
    """

    put = staticmethod(parts.put)
    copy_parts = staticmethod(parts.copy_parts)
    sum_parts = staticmethod(parts.sum_parts)
    put_rows = staticmethod(rows.put_rows)
    take_rows = staticmethod(rows.take_rows)
    add_rows = staticmethod(rows.add_rows)
    mark_blocks = staticmethod(pages.mark_blocks)
    take_pages = staticmethod(pages.take_pages)
    put_gradients = staticmethod(pages.put_gradients)
    add_gradients = staticmethod(pages.add_gradients)

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._boxes: dict[str, Mailbox] = {}
        self._outgrown: list[Mailbox] = []
        self.generation = 0  # changes with every new box, on all ranks alike: what holds addresses of boxes goes by it
        self._begins: dict[tuple[int, ...], Tensor] = {}

    def of(self, kind: str, num_bytes: int) -> Mailbox:
        """That of a kind, whose slots hold `num_bytes`, the same number on every rank.

        RuntimeError if there is none yet while a CUDA graph is captured.
        """
        box = self._boxes.get(kind)
        if box is None or box.slot_bytes < num_bytes:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{num_bytes} bytes of {kind!r} need a larger mailbox while a CUDA graph is captured, and making "
                    f"one needs the host and all ranks; run the same sizes once before the capture"
                )
            if box is not None:
                self._outgrown.append(box)
                num_bytes = max(num_bytes, box.slot_bytes * 5 // 4)  # sizes that creep up do not each replace it
            box = self._boxes[kind] = self._make(aligned(num_bytes))
            self.generation += 1
        return box

    def page_buffer(self, like: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Where pages are taken to, in the dtype of `like`."""
        return like.new_empty(sizes)

    def meet(self, box: Mailbox) -> None:
        """Everybody has put, and what is queued from here on sees it."""
        raise NotImplementedError

    def _make(self, slot_bytes: int) -> Mailbox:
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """That this rank keeps for its boxes."""
        boxes = (*self._boxes.values(), *self._outgrown)
        return sum(Mailbox.total_bytes(box.slot_bytes) for box in boxes)

    def begins(self, sizes: Sequence[int]) -> Tensor:
        """int64 [len(sizes) + 1] on the device: where each of so many rows begins, and where the last ends."""
        key = tuple(sizes)
        if key not in self._begins:
            if len(self._begins) >= _MOST_BEGINS:
                self._begins.clear()
            found = torch.tensor([0, *sizes]).cumsum(0)
            self._begins[key] = put_on(self.device, found)
        return self._begins[key]

    def header_bytes(self) -> int:
        return parts.header_bytes(self.size)


class SharedMailboxes(Mailboxes):
    """In memory that the GPUs of a group share."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device)
        self._group = group
        self._limit_ns = int(1e9 * comm.timeout_of(group).total_seconds())
        self._notice = torch.zeros(2, dtype=torch.int32, pin_memory=True)

    def meet(self, box: Mailbox) -> None:
        meet(box, self._limit_ns)

    def missing(self) -> int | None:
        """The rank, of all, that a meeting waited for in vain, after which every call of CUDA fails."""
        number = int(self._notice[0])
        return dist.get_global_rank(self._group, number - 1) if number else None

    def _make(self, slot_bytes: int) -> Mailbox:
        memory, addresses, handle = comm.shared_memory(self._group, Mailbox.total_bytes(slot_bytes), self.device)
        bases = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        epoch = torch.zeros(1, dtype=torch.int32, device=self.device)
        torch.cuda.synchronize(self.device)
        return Mailbox(bases, epoch, self._notice, self.rank, slot_bytes, (memory, handle))


@contextmanager
def naming_the_missing() -> Iterator[None]:
    """An exception inside, after a meeting waited in vain, becomes a RuntimeError that says for whom."""
    try:
        yield
    except Exception as error:
        found = [box.missing() for boxes in _OF_GROUPS.values() for box in boxes.values()]
        late = sorted({rank for rank in found if rank is not None})
        if not late:
            raise
        raise RuntimeError(
            f"rank {', '.join(map(str, late))} did not come to an exchange within the time that its group waits: it "
            f"was lost or hung, and what this process had on its device is lost with it"
        ) from error


_OF_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, SharedMailboxes]] = WeakKeyDictionary()


def shared_mailboxes(group: dist.ProcessGroup, device: torch.device) -> SharedMailboxes:
    """Those of a group, made once: they live as long as it does, as its communicators do."""
    of_devices = _OF_GROUPS.setdefault(group, {})
    if device not in of_devices:
        of_devices[device] = SharedMailboxes(group, device)
    return of_devices[device]
