"""What decoding kernels read of the books of a cache over ranks: which pages are here, and what follows each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nsa_dist.inference.pool import CmpPlacement
from nsa_dist.inference.tables import Held, Tables


class HeldOverRanks(Held, Protocol):
    """Of a sequence as `Held`, and where its pages begin."""

    home: int


@dataclass
class _Row:
    """What a table is told of a sequence."""

    ring: int
    length: int
    pages: Tensor
    told_pages: int
    told_length: int


class RankTables(Tables):
    """As `Tables`, with pages as this rank numbers them, -1 for those of others.

    cmp_table           replicated: int32 [rings, pages]: the ids of all pages, by which compressed rows lie
    following_table     sharded: int32 [rings, pages]: of page i its row of `RankStorage.following`, if page i - 1 is
                        here
    first               sharded: int32 [rings]: the first page of each sequence that is here
    """

    def __init__(
        self, device: torch.device, most_pages: int, cp_rank: int, cp_size: int, placement: CmpPlacement
    ) -> None:
        super().__init__(device, most_pages)
        self.cp_rank, self.cp_size, self.is_replicated = cp_rank, cp_size, placement == "replicated"
        # Replicated: of all pages. Sharded: its pages are those that follow, its lengths the first ones.
        self._other = Tables(device, most_pages)

    @property
    def cmp_table(self) -> Tensor:
        assert self.is_replicated
        return self._other.page_table

    @property
    def following_table(self) -> Tensor:
        assert not self.is_replicated
        return self._other.page_table

    @property
    def first(self) -> Tensor:
        assert not self.is_replicated
        return self._other.lengths

    def tell(self, states: Sequence[HeldOverRanks], num_rings: int) -> None:  # type: ignore[override]
        own, other = [], []
        for state in states:
            first = (self.cp_rank - state.home) % self.cp_size
            known = state.told_pages, state.told_length
            pages = state.pages if self.is_replicated else self._of_rank(state, 1)
            own.append(_Row(state.ring, state.length, self._of_rank(state, 0), *known))
            other.append(_Row(state.ring, first, pages, known[0], first if known[1] >= 0 else -1))
        super().tell(own, num_rings)
        self._other.tell(other, num_rings)
        for state in states:
            state.told_pages, state.told_length = len(state.pages), state.length

    def _of_rank(self, state: HeldOverRanks, ahead: int) -> Tensor:
        """Its pages on rank `cp_rank + ahead`, as numbered there, -1 for the others; those told already: any."""
        if state.told_pages == len(state.pages):
            return state.pages
        is_there = state.pages % self.cp_size == (self.cp_rank + ahead) % self.cp_size
        return torch.where(is_there, state.pages // self.cp_size, -1)
