"""A part of a paged cache: of each sequence every `step`-th page, from a first one of its own on.

Where the pages of a sequence lie on P devices in turn, each has such a part, with step P. Page p's compressed keys
give to block p - 1 as well, by eq. 9, if l > d: so a part holds, with each of its pages, the first l/d - 1 compressed
keys of the page after it once more, and finds the whole importance of its own blocks.

Or each part has the compressed rows of all pages, and only the tokens of its own: `TokenPart`.
"""

from typing import NamedTuple

from torch import Tensor

from nsa_kernels.decode_contracts import DecodeSizes, PagedCache


class CachePart(NamedTuple):
    """Step pages of a cache, with what follows each.

    cache           pages of this part; page_table has -1 for pages of a sequence that are elsewhere. Rings are whole
    first           int32 [R]: the first page of each sequence that is here, 0 to step - 1, or behind its last
    following       [pages, l/d - 1, Hkv, Dk]: the first compressed keys of pages that follow one of this part
    following_table int32 [R, max_pages]: of page p its row of `following` if page p - 1 is here, else -1
    step            pages from one of this part to the next
    """

    cache: PagedCache
    first: Tensor
    following: Tensor
    following_table: Tensor
    step: int

    @property
    def max_pages(self) -> int:
        """Pages of a sequence that can be here."""
        return -(-self.cache.page_table.shape[1] // self.step)


class TokenPart(NamedTuple):
    """Tokens of some pages of a cache, and the compressed rows and rings of all.

    cache       pages of this part, but for k_cmp, v_cmp, which have more; page_table has -1 for tokens' pages elsewhere
    cmp_table   int32 [R, max_pages]: of every page of a sequence where its compressed rows lie in k_cmp, v_cmp
    """

    cache: PagedCache
    cmp_table: Tensor

    @property
    def whole(self) -> PagedCache:
        """The same tensors, with the books of compressed rows."""
        return self.cache._replace(page_table=self.cmp_table)


def cells_following(sizes: DecodeSizes) -> int:
    """l/d - 1: compressed keys that give to the block before that of their page, if they lie in one page."""
    return sizes.cells_cmp - 1
