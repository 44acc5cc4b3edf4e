"""What one rank of a cache over ranks holds, and how a cache becomes one."""

import hashlib

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.device import put_on
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.over_ranks.tables import RankTables
from nsa_dist.inference.pool import CmpPlacement, placement_of
from nsa_dist.inference.storage import CacheShape, Pair, Storage, indexable


class RankStorage(Storage):
    """The pages of one rank, under ids of `PagePool` over ranks: page `id // P` of rank `id % P`. Rings are whole.

    placement       of `cmp`: "sharded", with the pages; "replicated", [P * num_pages, ...], those of all pages by id
    following       sharded: K tensors [num_pages, cells, Hkv, Dk], K = ceil((l/d - 1) / (l'/d)): entry m - 1 has of
                    each page of rank (cp_rank + m) % P the first compressed keys, which the importance of the page m
                    before it needs. Replicated: none
    """

    def __init__(self, whole: Storage, cp_rank: int, cp_size: int, placement: CmpPlacement) -> None:
        super().__init__(whole.shape, 0, whole.dtype, whole.device, whole.pages)
        self.cp_rank, self.cp_size, self.placement = cp_rank, cp_size, placement
        self.slc, self.cmp, self.win, self.raw, self._free_rings = (
            whole.slc, whole.cmp, whole.win, whole.raw, whole._free_rings,
        )  # fmt: skip
        num_pages, per_page = self.cmp.k.shape[:2]
        if self.is_replicated:
            self.cmp = self._zeros(num_pages * cp_size, per_page, self.pages.dtype)
        cells = [] if self.is_replicated else following_cells(whole.shape)
        self.following = [self._zeros(num_pages, count).k for count in cells]

    @property
    def is_replicated(self) -> bool:
        return self.placement == "replicated"

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + sum(x.nbytes for x in self.following)

    def slc_pages(self, pages: Tensor, ahead: int = 0) -> Tensor:
        """Of the page ids, what those of rank `cp_rank + ahead` are there; -1 for the others."""
        return torch.where(self.is_of(pages, ahead), pages // self.cp_size, -1)

    def cmp_pages(self, pages: Tensor) -> Tensor:
        """The same of `cmp` on this rank."""
        return pages if self.is_replicated else self.slc_pages(pages)

    def is_of(self, pages: Tensor, ahead: int = 0) -> Tensor:
        return pages % self.cp_size == (self.cp_rank + ahead) % self.cp_size

    def blank_pages(self, pages: Tensor) -> None:
        held = [(x, self.slc_pages(pages)) for x in self.slc] + [(x, self.cmp_pages(pages)) for x in self.cmp]
        held += [(keys, self.slc_pages(pages, ahead)) for ahead, keys in enumerate(self.following, 1)]
        for x, rows in held:
            indexable(x).index_fill_(0, put_on(self.device, rows[rows >= 0]), 0)

    def blank_tail(self, page: int, num_tokens: int, num_cmp: int) -> None:
        for pair, at, kept in self._held(page, num_tokens, num_cmp):
            for x in pair:
                x[at, kept:] = 0
        for keys in self._following_of(page):
            keys[page // self.cp_size, num_cmp:] = 0

    def copy_page(self, source: int, target: int, num_tokens: int, num_cmp: int) -> None:
        """Both are of one rank: the same page of two sequences that have one home."""
        both = zip(self._held(source, num_tokens, num_cmp), self._held(target, num_tokens, num_cmp), strict=True)
        for (pair, here, kept), (_, there, _) in both:
            for x in pair:
                x[there, :kept] = x[here, :kept]
        for keys in self._following_of(source):
            keys[target // self.cp_size, :num_cmp] = keys[source // self.cp_size, :num_cmp]

    def _held(self, page: int, num_tokens: int, num_cmp: int) -> list[tuple[Pair, int, int]]:
        """What is here of a page that has so many tokens and compressed blocks: the pair, the page in it, how many."""
        is_here, at = page % self.cp_size == self.cp_rank, page // self.cp_size
        held = [(self.slc, at, num_tokens)] if is_here else []
        if self.is_replicated:
            return [*held, (self.cmp, page, num_cmp)]
        return [*held, (self.cmp, at, num_cmp)] if is_here else []

    def _following_of(self, page: int) -> list[Tensor]:
        """Where the first keys of a page lie here."""
        ahead = (page - self.cp_rank) % self.cp_size
        return [keys for m, keys in enumerate(self.following, 1) if m % self.cp_size == ahead]


def following_cells(shape: CacheShape) -> list[int]:
    """Of the page 1, 2, ... after a selection block, how many compressed keys share cells with it.

    >>> from nsa_dist import NSAConfig
    >>> [following_cells(CacheShape(cfg, 1, 2, 2)) for cfg in (NSAConfig(32, 16, 64), NSAConfig(16, 4, 8))]
    [[1], [2, 1]]
    """
    left, per_page = shape.cfg.cmp_block_len // shape.cfg.cmp_stride - 1, shape.cmp_per_page
    return [min(per_page, left - taken) for taken in range(0, left, per_page)]


def rank_bytes(
    shape: CacheShape, cp_size: int, num_pages: int, num_rings: int, dtype: torch.dtype, placement: CmpPlacement
) -> int:
    """Of the tensors of one of `cp_size` ranks, a layer, each with `num_pages` pages: `CacheShape.num_bytes`, and where
    there are several ranks

        sharded     the keys that follow each page, num_pages * sum(following_cells) * Hkv * Dk numbers
        replicated  the compressed rows of the others, (P - 1) * num_pages * l'/d * Hkv * (Dk + Dv) numbers
    """
    own = shape.num_bytes(num_pages, num_rings, dtype)
    if placement == "replicated":
        rows = (cp_size - 1) * num_pages * shape.cmp_per_page
        return own + rows * shape.num_kv_heads * (shape.head_dim_k + shape.head_dim_v) * dtype.itemsize
    following = sum(following_cells(shape)) * shape.num_kv_heads * shape.head_dim_k * dtype.itemsize
    return own + (num_pages * following if cp_size > 1 else 0)


def placement_over(cache: NSACache, cp_size: int) -> CmpPlacement:
    """How the compressed rows of this cache lie over so many ranks, or will."""
    tokens = len(cache.storage.slc.k) * cp_size * cache.cfg.slc_block_len
    return placement_of(cache.cmp_placement, tokens)


def spread(cache: NSACache, comm: Comm) -> RankStorage:
    """The storage of this rank of the group; the cache becomes one over ranks in its first call.

    ValueError if it is one over another group or holds whole sequences, if its pages of 8 bits would be sharded, and on
    all ranks if their caches differ.
    """
    storage = cache.storage
    if isinstance(storage, RankStorage):
        if (storage.cp_rank, storage.cp_size) != (comm.rank, comm.size):
            raise ValueError(
                f"cp_group has {comm.size} ranks and this is rank {comm.rank}, but the cache is that of rank "
                f"{storage.cp_rank} of {storage.cp_size}: its pages lie where that group put them; pass that group, or "
                f"make another NSACache"
            )
        return storage
    placement = placement_over(cache, comm.size)
    if placement == "sharded" and storage.pages.is_fp8:
        raise ValueError(
            f"cp_group of {comm.size} ranks was given to a cache with page_dtype={storage.pages.dtype} whose "
            f"compressed keys are sharded: ranks then multiply them in the dtype of q, as they lie; make the NSACache "
            f"without page_dtype, or with cmp_placement='replicated'"
        )
    text = repr((cache.shape, len(storage.slc.k), storage.dtype, storage.pages, placement, comm.size))
    cache.hold_over_ranks(RankStorage(storage, comm.rank, comm.size, placement), comm.size)
    cache.tables = RankTables(storage.device, cache.tables.most_pages, comm.rank, comm.size, placement)
    if not comm.agree(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")):
        raise ValueError(
            f"the ranks of cp_group made different caches: rank {comm.rank} has {text}; each counts the pages of all, "
            f"so every rank needs the same sizes, num_pages, dtypes and cmp_placement; make the NSACache alike on all"
        )
    assert isinstance(cache.storage, RankStorage)
    return cache.storage


def refuse_part(cache: NSACache) -> None:
    """ValueError for a cache over ranks in a call without its group."""
    if isinstance(cache.storage, RankStorage):
        raise ValueError(
            f"no cp_group was given, but the cache lies over {cache.storage.cp_size} ranks, of which this one has a "
            f"part of the keys; pass the cp_group with which it was filled"
        )
