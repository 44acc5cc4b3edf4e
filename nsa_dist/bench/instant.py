"""A group whose transport takes no time: the kernels of a rank's share, and nothing that moves.

What context parallelism adds is a layer's time less this one's. Buffers hold whatever lay there: for times alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.cp.one_sided.comm import OneSidedComm
from nsa_dist.cp.one_sided.mailboxes import Mailboxes
from nsa_kernels.exchange.mailbox import Mailbox


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _unmarked(block_indices: Tensor, num_blocks: int) -> Tensor:
    return torch.empty(block_indices.shape[1], num_blocks, dtype=torch.uint8, device=block_indices.device)


def _left(
    box: Mailbox, own: tuple[Tensor, Tensor] | None, like: tuple[Tensor, Tensor], origin: Tensor, row: Tensor,
    offset_bytes: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k, v = (x.new_empty(len(row), *x.shape[1:]) for x in like)
    return k, v


class InstantMailboxes(Mailboxes):
    """Nothing is put and nothing taken."""

    put = copy_parts = sum_parts = take_pages = put_gradients = add_gradients = staticmethod(_nothing)
    put_rows = add_rows = staticmethod(_nothing)
    take_rows = staticmethod(_left)
    mark_blocks = staticmethod(_unmarked)

    def meet(self, box: Mailbox) -> None:
        pass

    def _make(self, slot_bytes: int) -> Mailbox:
        none = torch.zeros(1, dtype=torch.int64, device=self.device)
        return Mailbox(none, none, none, self.rank, slot_bytes)


@dataclass(frozen=True)
class InstantComm(OneSidedComm):
    """Rank `own_rank` of `num_ranks`, of which it is the only one."""

    num_ranks: int = 1
    own_rank: int = 0

    @classmethod
    def of(cls, rank: int, size: int, device: torch.device, **others: Any) -> "InstantComm":
        return cls(mailboxes=InstantMailboxes(rank, size, device), num_ranks=size, own_rank=rank, **others)

    @property
    def size(self) -> int:
        return self.num_ranks

    @property
    def rank(self) -> int:
        return self.own_rank

    def agree(self, value: int) -> bool:
        return True
