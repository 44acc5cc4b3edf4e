"""Which pages of the cache are whose: counted, not held. A page may belong to several sequences, read-only then.

Over ranks the tokens of a page lie on one; compressed keys and values may lie with them, or on every rank:

    replicated  each rank keeps and reads them all, chooses alone, and sends its part of selected attention: one
                exchange of a layer and step
    sharded     each rank keeps and reads a P-th: three exchanges, and bytes that shrink with the number of ranks

Replicated, a rank reads all N / d rows, and sharded a P-th of them, but waits for two exchanges more. At 1M tokens,
with the paper's sizes, Hkv 4, D 128 and bf16, they are 134 MB, about 35 us of an H200's memory, and a fourth of them
9 us; two all-gathers take tens of us.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

CmpPlacement = Literal["replicated", "sharded"]

MOST_REPLICATED_TOKENS = 2**20 + 2**16  # 1M of a context, and 64k that follow it


class CacheFullError(ValueError):
    """The pool has fewer free pages than a call needs. Nothing was written; the cache is as it was."""


class PagePool:
    """`num_pages` page ids of each of `cp_size` ranks, each with the number of sequences that hold it. On the CPU.

    A page is asked for by its turn: turn i is on rank i % P, and page p of rank r has the id p * P + r. Every rank
    counts the pages of all, so all of them find the same.
    """

    def __init__(self, num_pages: int, cp_size: int = 1) -> None:
        self.num_pages, self.cp_size = num_pages, cp_size
        self._holders = torch.zeros(num_pages * cp_size, dtype=torch.int32)
        # The next one last.
        self._free = [[page * cp_size + rank for page in range(num_pages - 1, -1, -1)] for rank in range(cp_size)]

    @property
    def num_free(self) -> int:
        """Of the rank that has fewest."""
        return min(len(pages) for pages in self._free)

    def need(self, turns: Sequence[int], what: str) -> None:
        """CacheFullError if there are not the free pages of these turns for `what`."""
        for rank, free in enumerate(self._free):
            count = sum(turn % self.cp_size == rank for turn in turns)
            if count > len(free):
                where = f" of rank {rank}" if self.cp_size > 1 else ""
                raise CacheFullError(
                    f"{what} needs {count} pages{where}, but {len(free)} of the cache's {self.num_pages} are free, and "
                    f"nothing is dropped unasked; free sequences that are done, or build the NSACache with num_pages="
                    f"{self.num_pages + count - len(free)} or more. Nothing was written"
                )

    def take(self, turns: Sequence[int]) -> Tensor:
        """A free page for each turn, int64, held once from now on. `need` says whether there are so many."""
        pages = torch.tensor([self._free[turn % self.cp_size].pop() for turn in turns], dtype=torch.int64)
        self._holders[pages] = 1
        return pages

    def share(self, pages: Tensor) -> None:
        """Another sequence holds these distinct pages, too."""
        self._holders[pages] += 1

    def drop(self, pages: Tensor) -> None:
        """A sequence holds these distinct pages no longer; those that none holds are free."""
        self._holders[pages] -= 1
        for page in reversed(pages[self._holders[pages] == 0].tolist()):
            self._free[page % self.cp_size].append(page)

    def is_shared(self, page: int) -> bool:
        return int(self._holders[page]) > 1


def placement_of(given: CmpPlacement | None, num_tokens: int) -> CmpPlacement:
    """What was asked for, or what suits a pool of `num_tokens` tokens, of all sequences and ranks together.

    ValueError for a name that is none.
    """
    if given is None:
        return "replicated" if num_tokens <= MOST_REPLICATED_TOKENS else "sharded"
    if given not in get_args(CmpPlacement):
        raise ValueError(
            f"cmp_placement={given!r} must be one of {', '.join(map(repr, get_args(CmpPlacement)))}, or None: "
            f"compressed keys lie on all ranks or each on one; leave it out, and they are replicated up to "
            f"{MOST_REPLICATED_TOKENS:,} tokens of all ranks' pages"
        )
    return given
