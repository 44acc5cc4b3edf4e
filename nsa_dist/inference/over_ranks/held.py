"""Keys and values as pages of 8 bits hold them, for attention that does not read them from pages."""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from nsa_dist.branches import BranchKV
from nsa_dist.compress import BlockPlaces, Compress, compress_one
from nsa_dist.inference.cache import NSACache
from nsa_kernels.decode_contracts import from_pages, in_pages


@dataclass(frozen=True)
class _HeldCompress:
    """phi, and of its results what pages of `dtype` hold."""

    phi: Compress | None
    block_len: int
    scale: float
    cache: NSACache

    takes_rows = True

    def __call__(self, rows: Tensor, block_start: Tensor, *, block_rows: Tensor, ops: ModuleType) -> Tensor:
        made = compress_one(self.phi, rows, BlockPlaces(block_rows, block_start, self.block_len), ops)
        return _held(made.to(rows.dtype), self.scale, self.cache)


def as_held(kv: BranchKV, cache: NSACache) -> tuple[BranchKV, Compress | None, Compress | None]:
    """kv and both phi of which attention finds what it would in the pages; rings round nothing."""
    pages = cache.storage.pages
    if not pages.is_fp8:
        return kv, cache.compress_k, cache.compress_v
    scales, block_len = (pages.k_scale, pages.v_scale), cache.cfg.cmp_block_len
    k, v = (_held(x, scale, cache) for x, scale in zip((kv.k_slc, kv.v_slc), scales, strict=True))
    phis = zip((cache.compress_k, cache.compress_v), scales, strict=True)
    compress_k, compress_v = (_HeldCompress(phi, block_len, scale, cache) for phi, scale in phis)
    return kv._replace(k_slc=k, v_slc=v), compress_k, compress_v


def _held(x: Tensor, scale: float, cache: NSACache) -> Tensor:
    return from_pages(in_pages(x, scale, cache.storage.pages.dtype), scale, x.dtype)
