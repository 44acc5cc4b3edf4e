"""What decoding kernels read of the books of a cache over ranks: which pages are here, and what follows each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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

    following_table     int32 [rings, pages]: of page i its row of `RankStorage.following` if page i - 1 is here
    first               int32 [rings]: the first page of each sequence that is here
    """

    def __init__(self, device: torch.device, most_pages: int, cp_rank: int, cp_size: int) -> None:
        super().__init__(device, most_pages)
        self.cp_rank, self.cp_size = cp_rank, cp_size
        self._after = Tables(device, most_pages)  # its pages are those that follow, its lengths the first ones

    @property
    def following_table(self) -> Tensor:
        return self._after.page_table

    @property
    def first(self) -> Tensor:
        return self._after.lengths

    def tell(self, states: Sequence[HeldOverRanks], num_rings: int) -> None:  # type: ignore[override]
        own, after = [], []
        for state in states:
            first = (self.cp_rank - state.home) % self.cp_size
            known = state.told_pages, state.told_length
            own.append(_Row(state.ring, state.length, self._of_rank(state, 0), *known))
            after.append(_Row(state.ring, first, self._of_rank(state, 1), known[0], first if known[1] >= 0 else -1))
        super().tell(own, num_rings)
        self._after.tell(after, num_rings)
        for state in states:
            state.told_pages, state.told_length = len(state.pages), state.length

    def _of_rank(self, state: HeldOverRanks, ahead: int) -> Tensor:
        """Its pages on rank `cp_rank + ahead`, as numbered there, -1 for the others; those told already: any."""
        if state.told_pages == len(state.pages):
            return state.pages
        is_there = state.pages % self.cp_size == (self.cp_rank + ahead) % self.cp_size
        return torch.where(is_there, state.pages // self.cp_size, -1)
