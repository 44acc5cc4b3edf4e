"""What the decoding functions take: the tensors of a paged cache, and the sizes of the branches.

    page    l' tokens       k_slc, v_slc of each, and the l'/d compressed keys and values whose last token lies in it
    ring    one sequence    k_win, v_win of its last tokens; k_raw, v_raw: k_cmp, v_cmp before phi, likewise

Cells       Compressed block i is the cell `i + l/d - 1` of its sequence: the stride of d tokens that it ends with.
            Page p holds the cells p*S .. p*S+S-1, S = l'/d. Cell r of a page gives to selection block p (layer 0), p-1
            (layer 1), ..., by eq. 9's weights: for 32/16/64 cells 0..3 give 1, 2, 2, 2 to their own block, and cell 0
            gives 1 to the block before.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST_NEW = 8  # new tokens a sequence


class DecodeSizes(NamedTuple):
    """Names and meanings as in `contracts`."""

    cmp_block_len: int
    cmp_stride: int
    slc_block_len: int
    num_slc_blocks: int
    num_init_blocks: int
    num_local_blocks: int
    window_len: int

    @property
    def cells_cmp(self) -> int:
        """l / d: strides in a compressed block."""
        return self.cmp_block_len // self.cmp_stride

    @property
    def cells_slc(self) -> int:
        """S = l' / d: strides, and compressed rows, in a page."""
        return self.slc_block_len // self.cmp_stride

    @property
    def num_layers(self) -> int:
        """Selection blocks that a compressed row can give to."""
        return 1 - (1 - self.cells_cmp) // self.cells_slc


class PagedCache(NamedTuple):
    """A cache as it lies on the device; all of its tensors are contiguous.

    k_slc, v_slc    [num_pages, l', Hkv, Dk or Dv]
    k_cmp, v_cmp    [num_pages, l'/d, Hkv, Dk or Dv]
    k_win, v_win    [R, at least w + new - 1, Hkv, Dk or Dv]: token p is entry p % length of its sequence's ring
    k_raw, v_raw    [R, at least l + new - 1, Hkv, Dk or Dv], likewise
    page_table      int32 [R, max_pages]: the pages of each sequence in order; entries past its last page are not read
    lengths         int32 [R]: its tokens
    k_scale, v_scale    powers of two by which pages in e4m3 are multiplied; 1 for pages in the dtype of the rings

    k_slc, v_slc, k_cmp and v_cmp, the pages, have the dtype of the rings, or all of them float8_e4m3fn.
    """

    k_slc: Tensor
    v_slc: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor
    v_win: Tensor
    k_raw: Tensor
    v_raw: Tensor
    page_table: Tensor
    lengths: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0


class Appended(NamedTuple):
    """What `decode_append` leaves to phi, `decode_store` and `decode_attention`.

    ends            int32 [B]: tokens of each sequence with the new ones; 0: an empty slot
    k_raw, v_raw    [B * F * l, Hkv, Dk or Dv]: the tokens of the blocks that have become whole, F = ceil(new / d)
                    places for each sequence; places without a block hold anything
    block_rows      int32 [B * F]: 0, l, 2 l, ..: where each block begins in them
    block_start     int64 [B * F]: and in its sequence; 0 where there is none
    cell_rows       int32 [B * F]: row of the flat compressed pages that it goes to; -1 where there is none
    arrived         int32 [B, 2 * Hkv]: zeros, with which phi's programs count themselves; None: of the reference
    """

    ends: Tensor
    k_raw: Tensor
    v_raw: Tensor
    block_rows: Tensor
    block_start: Tensor
    cell_rows: Tensor
    arrived: Tensor | None = None


MOST_E4M3 = 448.0  # larger numbers are cut off


def in_pages(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`x` as pages of `dtype` hold it."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    return (x.float() * (1 / scale)).clamp(-MOST_E4M3, MOST_E4M3).to(dtype)


def from_pages(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What pages hold, in `dtype`: exact, as scales are powers of two."""
    return x.to(dtype) * scale if x.dtype == torch.float8_e4m3fn else x.to(dtype)


def check_pages(cache: PagedCache) -> None:
    """ValueError for pages that are neither in the dtype of the rings nor in e4m3."""
    pages = {x.dtype for x in (cache.k_slc, cache.v_slc, cache.k_cmp, cache.v_cmp)}
    if pages not in ({cache.k_win.dtype}, {torch.float8_e4m3fn}):
        raise ValueError(
            f"pages of {sorted(map(str, pages))} must all be {cache.k_win.dtype}, as the rings are, or float8_e4m3fn: "
            f"the products take the dtype of the queries, and 8 bits are widened to it; make them so"
        )


def check_call(q: Tensor, gates: Tensor, cache: PagedCache, slots: Tensor, sizes: DecodeSizes) -> None:
    """ValueError for q, gates and slots that do not fit the cache."""
    num_kv_heads, dim_k = cache.k_slc.shape[2:]
    batch, new, num_q_heads = q.shape[:3]
    if num_q_heads % num_kv_heads or q.shape[3] != dim_k or gates.shape != (batch, new, num_q_heads, 3):
        raise ValueError(
            f"q {tuple(q.shape)} and gates {tuple(gates.shape)} do not fit a cache of {num_kv_heads} heads of {dim_k}: "
            f"they must be [B, new, Hq, {dim_k}] and [B, new, Hq, 3] with Hq a multiple of {num_kv_heads}; pass the "
            f"cache of this layer"
        )
    if slots.shape != (batch,) or slots.dtype != torch.int32 or not 1 <= new <= MOST_NEW:
        raise ValueError(
            f"slots {slots.dtype} {tuple(slots.shape)} and q {tuple(q.shape)} do not fit: one int32 a sequence, and 1 "
            f"to {MOST_NEW} new tokens, which the rings have room for; pass slots of [{batch}], and chunks of "
            f"{MOST_NEW} tokens at most"
        )
    if cache.k_win.shape[1] < sizes.window_len + new - 1 or cache.k_raw.shape[1] < sizes.cmp_block_len + new - 1:
        raise ValueError(
            f"rings of {cache.k_win.shape[1]} and {cache.k_raw.shape[1]} tokens are shorter than window_len and "
            f"cmp_block_len and the {new} new tokens, which would overwrite what they attend to; make rings of "
            f"window_len + {MOST_NEW} and cmp_block_len + {MOST_NEW}"
        )
