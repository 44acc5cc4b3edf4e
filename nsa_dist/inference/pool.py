"""Which pages of the cache are whose: counted, not held. A page may belong to several sequences, read-only then."""

import torch
from torch import Tensor


class CacheFullError(ValueError):
    """The pool has fewer free pages than a call needs. Nothing was written; the cache is as it was."""


class PagePool:
    """`num_pages` page ids, each with the number of sequences that hold it. On the CPU, whatever the pages are on."""

    def __init__(self, num_pages: int) -> None:
        self._holders = torch.zeros(num_pages, dtype=torch.int32)
        self._free = list(range(num_pages - 1, -1, -1))  # the next one last

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def need(self, count: int, what: str) -> None:
        """CacheFullError if there are not `count` free pages for `what`."""
        if count > self.num_free:
            raise CacheFullError(
                f"{what} needs {count} pages, but {self.num_free} of the cache's {self.num_pages} are free, and "
                f"nothing is dropped unasked; free sequences that are done, or build the NSACache with num_pages="
                f"{self.num_pages + count - self.num_free} or more. Nothing was written"
            )

    def take(self, count: int) -> Tensor:
        """`count` free pages, int64, held once from now on. `need` says whether there are so many."""
        pages = torch.tensor([self._free.pop() for _ in range(count)], dtype=torch.int64)
        self._holders[pages] = 1
        return pages

    def share(self, pages: Tensor) -> None:
        """Another sequence holds these distinct pages, too."""
        self._holders[pages] += 1

    def drop(self, pages: Tensor) -> None:
        """A sequence holds these distinct pages no longer; those that none holds are free."""
        self._holders[pages] -= 1
        self._free += reversed(pages[self._holders[pages] == 0].tolist())

    def is_shared(self, page: int) -> bool:
        return int(self._holders[page]) > 1
