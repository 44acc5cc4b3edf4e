"""A group whose transport takes no time: the kernels of a rank's share, and nothing that moves.

What context parallelism adds is a layer's time less this one's. What other ranks would have sent are normal numbers,
drawn once: a GPU that multiplies zeros needs less power and is quicker.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.bench.synthetic import OneOfMany
from nsa_dist.cp.comm import Handle
from nsa_dist.cp.one_sided.comm import OneSidedComm
from nsa_dist.cp.one_sided.mailboxes import Mailboxes
from nsa_kernels.exchange.mailbox import Mailbox


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _unmarked(block_indices: Tensor, num_blocks: int) -> Tensor:
    return torch.empty(block_indices.shape[1], num_blocks, dtype=torch.uint8, device=block_indices.device)


class InstantMailboxes(Mailboxes):
    """Nothing is put and nothing taken; whoever takes finds what was drawn for that shape."""

    put = copy_parts = sum_parts = take_pages = put_gradients = add_gradients = staticmethod(_nothing)
    put_rows = add_rows = staticmethod(_nothing)
    mark_blocks = staticmethod(_unmarked)

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        super().__init__(rank, size, device)
        self._drawn: dict[tuple, Tensor] = {}

    def drawn(self, like: Tensor, sizes: tuple[int, ...], which: str) -> Tensor:
        """Normal numbers of `sizes` in the dtype of `like`, the same tensor each time."""
        key = (which, like.dtype, sizes)
        if key not in self._drawn:
            self._drawn[key] = torch.randn(sizes, device=self.device).to(like.dtype)
        return self._drawn[key]

    def page_buffer(self, like: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return self.drawn(like, sizes, "pages")

    def take_rows(
        self, box: Mailbox, own: tuple[Tensor, Tensor] | None, like: tuple[Tensor, Tensor], origin: Tensor, row: Tensor,
        offset_bytes: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        k, v = (self.drawn(x, (len(row), *x.shape[1:]), name) for x, name in zip(like, "kv", strict=True))
        return k, v

    def meet(self, box: Mailbox) -> None:
        pass

    def _make(self, slot_bytes: int) -> Mailbox:
        none = torch.zeros(1, dtype=torch.int64, device=self.device)
        return Mailbox(none, none, none, self.rank, slot_bytes)


@dataclass(frozen=True)
class InstantComm(OneOfMany, OneSidedComm):
    """One of many that finds what it needs."""

    @classmethod
    def of(cls, rank: int, size: int, device: torch.device, **others: Any) -> "InstantComm":
        return cls(mailboxes=InstantMailboxes(rank, size, device), num_ranks=size, own_rank=rank, **others)

    def post_all_gather(self, x: Tensor, kind: str, name: str = "") -> Handle:
        return Handle(self._drawn(x, (self.size, *x.shape)))

    def post_reduce_scatter(self, x: Tensor, kind: str, name: str = "") -> Handle:
        return Handle(self._drawn(x, x.shape[1:]))

    def post_all_to_all(self, x: Tensor, send_sizes: Any, recv_sizes: Any, kind: str, name: str = "",
                        most_sent: int | None = None) -> Handle:  # fmt: skip
        return Handle(self._drawn(x, (sum(recv_sizes), *x.shape[1:])))

    def _drawn(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        assert isinstance(self.mailboxes, InstantMailboxes)
        return self.mailboxes.drawn(x, tuple(sizes), "parts")
