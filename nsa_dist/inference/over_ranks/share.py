"""Which of the rows that one call reads and writes are on this rank: index tensors, made from those of one rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_dist.cp.device import put_on
from nsa_dist.inference.cache import SequenceState
from nsa_dist.inference.over_ranks.storage import RankStorage
from nsa_dist.inference.places import Places

PagesHere = Callable[[Tensor], Tensor]  # ids of pages -> their numbers on this rank, -1 for those elsewhere


class Kept(NamedTuple):
    """Which of some rows are written, and where to."""

    rows: Tensor  # int64
    slots: Tensor  # int64


class OwnBlocks(NamedTuple):
    """The selection blocks of one sequence that are here, J of them."""

    queries: slice  # the sequence's new tokens
    blocks: Tensor  # int64 [J], ascending
    pages: Tensor  # int64 [J]: theirs
    following: list[Tensor]  # int64 [J] each: the page 1, 2, ... after, as `RankStorage.following` has it

    def keys(self, storage: RankStorage) -> Tensor:
        """[J, K, Hkv, Dk]: the compressed keys that share cells with each. Those of pages there are not: any."""
        after = [keys[pages] for keys, pages in zip(storage.following, self.following, strict=True)]
        return torch.cat([storage.cmp.k[self.pages], *after], 1)


@dataclass(frozen=True)
class Share:
    """Of T new tokens, F fresh compressed blocks and M compressed ones, what is on this rank."""

    tokens: Kept  # of the new tokens, rows of the flat pages
    fresh: Kept  # of the fresh blocks, rows of the flat pages
    following: list[Kept]  # of the fresh blocks, rows of each flat `RankStorage.following`
    cmp_slots: Tensor  # int64: rows of the flat pages of the compressed blocks that are here
    cmp_begin: Tensor  # int32 [T]: which of those a query sees, [begin, end)
    cmp_end: Tensor
    block_page: Tensor  # int64 [blocks of the stream]: their pages, -1 elsewhere
    sequences: list[OwnBlocks]  # if compressed rows are sharded

    @classmethod
    def of(
        cls, at: Places, states: Sequence[SequenceState], added: Sequence[int], storage: RankStorage,
        device: torch.device,
    ) -> "Share":  # fmt: skip
        """`at` is made on the CPU, with a row a token; its slots and pages are those of `PagePool` over ranks."""
        shape = storage.shape
        own_cmp, cmp_slots = _here(at.cmp_slots, shape.cmp_per_page, storage.cmp_pages)
        before = torch.nn.functional.pad(own_cmp.cumsum(0), (1, 0))

        def put(index: Tensor) -> Tensor:
            return put_on(device, index)

        def kept(slots: Tensor, per_page: int, pages_here: PagesHere) -> Kept:
            here, rows = _here(slots, per_page, pages_here)
            return Kept(put(here.nonzero().squeeze(1)), put(rows))

        return cls(
            tokens=kept(at.new_slots, shape.cfg.slc_block_len, storage.slc_pages),
            fresh=kept(at.fresh_slots, shape.cmp_per_page, storage.cmp_pages),
            following=[
                Kept(*map(put, _following(at.fresh_slots, ahead, keys.shape[1], storage)))
                for ahead, keys in enumerate(storage.following, 1)
            ],
            cmp_slots=put(cmp_slots),
            cmp_begin=put(before[at.cmp_begin.long()].to(torch.int32)),
            cmp_end=put(before[at.cmp_end.long()].to(torch.int32)),
            block_page=put(storage.slc_pages(at.block_page)),
            sequences=[] if storage.is_replicated else _sequences(states, added, storage, put),
        )


def _here(slots: Tensor, per_page: int, pages_here: PagesHere) -> tuple[Tensor, Tensor]:
    """Which rows of the flat pages of all ranks are on this one, and the rows of its own pages."""
    page = pages_here(slots // per_page)
    here = page >= 0
    return here, (page * per_page + slots % per_page)[here]


def _following(slots: Tensor, ahead: int, cells: int, storage: RankStorage) -> tuple[Tensor, Tensor]:
    """Which of these compressed blocks this rank keeps once more, as beginning the page `ahead` of one of its own."""
    per_page = storage.shape.cmp_per_page
    page, cell = slots // per_page, slots % per_page
    kept = storage.is_of(page, ahead) & (cell < cells)
    return kept.nonzero().squeeze(1), (page // storage.cp_size * cells + cell)[kept]


def _sequences(states: Sequence[SequenceState], added: Sequence[int], storage: RankStorage, put) -> list[OwnBlocks]:
    found, start = [], 0
    for state, count in zip(states, added, strict=True):
        blocks = storage.is_of(state.pages).nonzero().squeeze(1)
        after = [
            state.pages[(blocks + ahead).clamp(max=len(state.pages) - 1)] // storage.cp_size
            for ahead in range(1, len(storage.following) + 1)
        ]
        pages = state.pages[blocks] // storage.cp_size
        found.append(OwnBlocks(slice(start, start + count), put(blocks), put(pages), [put(x) for x in after]))
        start += count
    return found
