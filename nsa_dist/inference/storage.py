"""The tensors of a cache: pages of all sequences, rings of each.

    page    l' tokens       k_slc, v_slc of each, and the l'/d compressed keys and values whose last token lies in it
    ring    one sequence    k_win, v_win of the last w + 8 tokens; k_cmp, v_cmp before phi of the last l + 8

Pages may hold numbers of 8 bits, e4m3, times a scale for keys and one for values; rings never do.

A compressed block lies with its last token, so a full page never changes, whatever follows: sequences with a common
prefix share it. Token p is row p % l' of its page, and entry p % length of its ring.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.device import put_on
from nsa_kernels.decode_contracts import from_pages, in_pages

MOST_BACK = 8  # tokens that may be taken back, and new ones of a decoding call


class CacheShape(NamedTuple):
    """What decides the bytes of a cache."""

    cfg: NSAConfig
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int

    @property
    def cmp_per_page(self) -> int:
        """Compressed blocks that end in a page: l' / d."""
        return self.cfg.slc_block_len // self.cfg.cmp_stride

    @property
    def win_ring(self) -> int:
        """Tokens: w + 8."""
        return self.cfg.window_len + MOST_BACK

    @property
    def raw_ring(self) -> int:
        """Tokens: l + 8."""
        return self.cfg.cmp_block_len + MOST_BACK

    def num_bytes(
        self, num_pages: int, num_rings: int, dtype: torch.dtype, page_dtype: torch.dtype | None = None
    ) -> int:
        """Of the tensors of a cache of one layer, a number of which has b bytes in rings and b' in pages.

            numbers = Hkv * (Dk + Dv)
            num_pages * (l' + l'/d) * numbers * b'  +  num_rings * (w + 8 + l + 8) * numbers * b

        A dense cache takes num_pages * l' * numbers * b: with d = 16 the pages take 1 + 1/16 of it, in 8 bits half.
        """
        numbers = self.num_kv_heads * (self.head_dim_k + self.head_dim_v)
        pages = num_pages * (self.cfg.slc_block_len + self.cmp_per_page) * (page_dtype or dtype).itemsize
        return (pages + num_rings * (self.win_ring + self.raw_ring) * dtype.itemsize) * numbers


class Pair(NamedTuple):
    """Keys and values side by side: [..., Hkv, Dk], [..., Hkv, Dv]."""

    k: Tensor
    v: Tensor

    def flat(self) -> "Pair":
        """Rows of all pages or rings one behind the other."""
        return Pair(self.k.flatten(0, 1), self.v.flatten(0, 1))

    def write(self, rows: Tensor, new: "Pair") -> None:
        for x, y in zip(self.flat(), new, strict=True):
            x.index_copy_(0, rows, y)

    def read(self, rows: Tensor) -> "Pair":
        return Pair(*(x.index_select(0, rows) for x in self.flat()))


class PageFormat(NamedTuple):
    """Of the numbers of pages: `dtype`, and what those of keys and values are multiplied by, powers of two."""

    dtype: torch.dtype
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def is_fp8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn


class Storage:
    """Pages [num_pages, rows of a page, Hkv, D], all zero at first; rings [rings, entries, Hkv, D], added as needed.

    dtype       of rings, and of pages unless `pages` says otherwise
    """

    def __init__(
        self,
        shape: CacheShape,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        pages: PageFormat | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.pages = pages or PageFormat(dtype)
        self.slc = self._zeros(num_pages, shape.cfg.slc_block_len, self.pages.dtype)
        self.cmp = self._zeros(num_pages, shape.cmp_per_page, self.pages.dtype)
        self.win = self._zeros(0, shape.win_ring)
        self.raw = self._zeros(0, shape.raw_ring)
        self._free_rings: list[int] = []

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.itemsize for pair in (self.slc, self.cmp, self.win, self.raw) for x in pair)

    @property
    def num_rings(self) -> int:
        return len(self.win.k)

    def reserve_rings(self, count: int) -> None:
        """Room for `count` sequences in all; what is there is copied."""
        added = count - self.num_rings
        if added > 0:
            self._free_rings += range(count - 1, self.num_rings - 1, -1)
            self.win, self.raw = (
                Pair(*(torch.cat(both) for both in zip(pair, self._zeros(added, pair.k.shape[1]), strict=True)))
                for pair in (self.win, self.raw)
            )

    def take_ring(self) -> int:
        if not self._free_rings:
            self.reserve_rings(max(1, 2 * self.num_rings))
        return self._free_rings.pop()

    def drop_ring(self, ring: int) -> None:
        self._free_rings.append(ring)

    def copy_ring(self, source: int, target: int) -> None:
        for x in (*self.win, *self.raw):
            x[target] = x[source]

    def write_pages(self, pages: Pair, rows: Tensor, new: Pair) -> None:
        """`new` [len(rows), Hkv, D] to rows of the flat `pages`, `slc` or `cmp`."""
        scales = self.pages.k_scale, self.pages.v_scale
        held = (in_pages(x, scale, self.pages.dtype) for x, scale in zip(new, scales, strict=True))
        Pair(*map(indexable, pages)).write(rows, Pair(*map(indexable, held)))

    def read_pages(self, pages: Pair, rows: Tensor) -> Pair:
        """Rows of the flat `pages`, in the dtype of the rings."""
        return self.widened(Pair(*(x.view(self.pages.dtype) for x in Pair(*map(indexable, pages)).read(rows))))

    def widened(self, found: Pair) -> Pair:
        """What pages hold, in the dtype of the rings."""
        scales = self.pages.k_scale, self.pages.v_scale
        return Pair(*(from_pages(x, scale, self.dtype) for x, scale in zip(found, scales, strict=True)))

    def blank_pages(self, pages: Tensor) -> None:
        """Zeros: what a freed sequence left there may be NaN, and 0 times NaN is NaN."""
        index = put_on(self.device, pages)
        for x in (*self.slc, *self.cmp):
            indexable(x).index_fill_(0, index, 0)

    def blank_tail(self, page: int, num_tokens: int, num_cmp: int) -> None:
        """All but the first tokens and compressed blocks of a page."""
        for pair, kept in ((self.slc, num_tokens), (self.cmp, num_cmp)):
            for x in pair:
                x[page, kept:] = 0

    def copy_page(self, source: int, target: int, num_tokens: int, num_cmp: int) -> None:
        """The first tokens and compressed blocks of a page into another, a blank one."""
        for pair, kept in ((self.slc, num_tokens), (self.cmp, num_cmp)):
            for x in pair:
                x[target, :kept] = x[source, :kept]

    def _zeros(self, count: int, rows: int, dtype: torch.dtype | None = None) -> Pair:
        """dtype: None for the rings'."""
        shape, dtype = self.shape, dtype or self.dtype
        sizes = ((count, rows, shape.num_kv_heads, dim) for dim in (shape.head_dim_k, shape.head_dim_v))
        return Pair(*(torch.zeros(*size, dtype=dtype, device=self.device) for size in sizes))


def indexable(x: Tensor) -> Tensor:
    """`x` by its bytes where it has numbers of 8 bits, which torch does not index."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
