"""What one rank of a cache over ranks holds, and how a cache becomes one."""

import hashlib

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.over_ranks.tables import RankTables
from nsa_dist.inference.storage import CacheShape, Storage


class RankStorage(Storage):
    """The pages of one rank, under ids of `PagePool` over ranks: page `id // P` of rank `id % P`. Rings are whole.

    following       K tensors [num_pages, cells, Hkv, Dk], K = ceil((l/d - 1) / (l'/d)): entry m - 1 has of each page of
                    rank (cp_rank + m) % P the first compressed keys, which the importance of the page m before it needs
    """

    def __init__(self, whole: Storage, cp_rank: int, cp_size: int) -> None:
        super().__init__(whole.shape, 0, whole.dtype, whole.device)
        self.cp_rank, self.cp_size = cp_rank, cp_size
        self.slc, self.cmp, self.win, self.raw, self._free_rings = (
            whole.slc, whole.cmp, whole.win, whole.raw, whole._free_rings,
        )  # fmt: skip
        cells = following_cells(whole.shape)
        self.following = [self._zeros(len(self.cmp.k), count).k for count in cells]

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + sum(x.nbytes for x in self.following)

    def local(self, pages: Tensor, ahead: int = 0) -> Tensor:
        """Of the page ids those of rank `cp_rank + ahead`, as pages there."""
        return pages[self.is_of(pages, ahead)] // self.cp_size

    def is_of(self, pages: Tensor, ahead: int = 0) -> Tensor:
        return pages % self.cp_size == (self.cp_rank + ahead) % self.cp_size

    def blank_pages(self, pages: Tensor) -> None:
        super().blank_pages(self.local(pages))
        for ahead, keys in enumerate(self.following, 1):
            keys.index_fill_(0, self.local(pages, ahead).to(self.device), 0)

    def blank_tail(self, page: int, num_tokens: int, num_cmp: int) -> None:
        if page % self.cp_size == self.cp_rank:
            super().blank_tail(page // self.cp_size, num_tokens, num_cmp)
        for keys in self._following_of(page):
            keys[page // self.cp_size, num_cmp:] = 0

    def copy_page(self, source: int, target: int, num_tokens: int, num_cmp: int) -> None:
        """Both are of one rank: the same page of two sequences that have one home."""
        here, there = source // self.cp_size, target // self.cp_size
        if source % self.cp_size == self.cp_rank:
            super().copy_page(here, there, num_tokens, num_cmp)
        for keys in self._following_of(source):
            keys[there, :num_cmp] = keys[here, :num_cmp]

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


def rank_bytes(shape: CacheShape, cp_size: int, num_pages: int, num_rings: int, dtype: torch.dtype) -> int:
    """Of the tensors of one of `cp_size` ranks, a layer: `CacheShape.num_bytes`, and where there are several ranks the
    keys that follow each page, sum(following_cells) * Hkv * Dk numbers."""
    following = sum(following_cells(shape)) * shape.num_kv_heads * shape.head_dim_k * dtype.itemsize
    return shape.num_bytes(num_pages, num_rings, dtype) + (num_pages * following if cp_size > 1 else 0)


def spread(cache: NSACache, comm: Comm) -> RankStorage:
    """The storage of this rank of the group; the cache becomes one over ranks in its first call.

    ValueError if it is one over another group or holds whole sequences, and on all ranks if their caches differ.
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
    text = repr((cache.shape, len(storage.slc.k), storage.dtype, comm.size))
    cache.hold_over_ranks(RankStorage(storage, comm.rank, comm.size), comm.size)
    cache.tables = RankTables(storage.device, cache.tables.most_pages, comm.rank, comm.size)
    if not comm.agree(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")):
        raise ValueError(
            f"the ranks of cp_group made different caches: rank {comm.rank} has {text}; each counts the pages of all, "
            f"so every rank needs the same sizes, num_pages and dtype; make the NSACache alike on all"
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
