"""What is new goes into pages and rings; the tokens of blocks that have become whole are laid out for phi.

Tokens `lengths[slot] .. + new` of a sequence are written to their page (k_slc, v_slc) and to its rings (the others).
A compressed block is whole with its last token: those are the blocks `num_cmp(length) .. num_cmp(length + new)`, at
most F = ceil(new / d). Tokens of theirs come from the ring or, where they are new, from what is given: what the ring
loses in the same launch is older than any of them.

Example     l, d = 32, 16; 46 tokens, 3 new: 46 hold 1 block, 49 hold 2; block 1 is tokens 16 .. 47
Shapes      `decode_contracts`; new keys and values packed [B * new, Hkv, D], any strides but the last
Work        bytes: the new tokens, and l tokens of the compressed branch for each block that has become whole
Reference   nsa_kernels.reference.decode
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.limits import check_dtypes
from nsa_kernels.common.overlap import let_next_begin, overlapping, wait
from nsa_kernels.common.rows import token_head_strides, unit_stride
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.decode_contracts import MOST_NEW, Appended, DecodeSizes, PagedCache, check_pages


@triton.jit
def num_whole(length, CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr):
    """Compressed blocks of a sequence of `length` tokens."""
    return tl.where(length >= CMP_LEN, (length - CMP_LEN) // CMP_STRIDE + 1, 0)


@triton.jit
def in_page(x, inverse, page_ptr):
    """x in the dtype of the pages: in 8 bits divided by a scale, numbers that are too large cut off."""
    if page_ptr.dtype.element_ty == tl.float8e4nv:
        x = x.to(tl.float32) * inverse
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(page_ptr.dtype.element_ty)


@triton.jit
def _load_token(x_ptr, token, stride_t, stride_h, head, dim, mask):
    return tl.load(x_ptr + token * stride_t + head * stride_h + dim, mask=mask, other=0.0)


@triton.jit
def write_token(
    k_cmp_ptr, v_cmp_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, table,
    k_page_ptr, v_page_ptr, k_win_ring_ptr, v_win_ring_ptr, k_raw_ring_ptr, v_raw_ring_ptr,
    token, slot, position, num_heads, win_ring, raw_ring, k_inverse, v_inverse,
    stride_kct, stride_kch, stride_vct, stride_vch, stride_kst, stride_ksh, stride_vst, stride_vsh,
    stride_kwt, stride_kwh, stride_vwt, stride_vwh,
    SLC_LEN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Row `token` of what is given, at `position` of its sequence: to its page, unless that is none (below 0), and to
    rings. `table`: its pages."""
    in_k = tl.arange(0, BLOCK_K)
    in_v = tl.arange(0, BLOCK_V)
    head_k, dim_k, mask_k = in_k // DK, in_k % DK, in_k < num_heads * DK
    head_v, dim_v, mask_v = in_v // DV, in_v % DV, in_v < num_heads * DV
    page = tl.load(table + position // SLC_LEN).to(tl.int64)
    row = (page * SLC_LEN + position % SLC_LEN) * num_heads
    win = (slot * win_ring + position % win_ring) * num_heads
    raw = (slot * raw_ring + position % raw_ring) * num_heads
    k_slc = _load_token(k_slc_ptr, token, stride_kst, stride_ksh, head_k, dim_k, mask_k)
    v_slc = _load_token(v_slc_ptr, token, stride_vst, stride_vsh, head_v, dim_v, mask_v)
    k_win = _load_token(k_win_ptr, token, stride_kwt, stride_kwh, head_k, dim_k, mask_k)
    v_win = _load_token(v_win_ptr, token, stride_vwt, stride_vwh, head_v, dim_v, mask_v)
    k_raw = _load_token(k_cmp_ptr, token, stride_kct, stride_kch, head_k, dim_k, mask_k)
    v_raw = _load_token(v_cmp_ptr, token, stride_vct, stride_vch, head_v, dim_v, mask_v)
    tl.store(k_win_ring_ptr + win * DK + in_k, k_win, mask=mask_k)
    tl.store(v_win_ring_ptr + win * DV + in_v, v_win, mask=mask_v)
    tl.store(k_raw_ring_ptr + raw * DK + in_k, k_raw, mask=mask_k)
    tl.store(v_raw_ring_ptr + raw * DV + in_v, v_raw, mask=mask_v)
    tl.store(k_page_ptr + row * DK + in_k, in_page(k_slc, k_inverse, k_page_ptr), mask=mask_k & (page >= 0))
    tl.store(v_page_ptr + row * DV + in_v, in_page(v_slc, v_inverse, v_page_ptr), mask=mask_v & (page >= 0))


@launchable
@triton.jit
def _append_kernel(
    k_cmp_ptr, v_cmp_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, slots_ptr, page_table_ptr, lengths_ptr,
    k_page_ptr, v_page_ptr, k_win_ring_ptr, v_win_ring_ptr, k_raw_ring_ptr, v_raw_ring_ptr,
    ends_ptr, k_raw_ptr, v_raw_ptr, block_rows_ptr, block_start_ptr, cell_rows_ptr, arrived_ptr,
    max_pages, num_heads, win_ring, raw_ring, new, k_inverse, v_inverse,
    stride_kct, stride_kch, stride_vct, stride_vch, stride_kst, stride_ksh, stride_vst, stride_vsh,
    stride_kwt, stride_kwh, stride_vwt, stride_vwh,
    NUM_FRESH: tl.constexpr, UNIT_TOKENS: tl.constexpr, HEADS_PAD: tl.constexpr,
    CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, SLC_LEN: tl.constexpr,
    CELLS_SLC: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Unit u < new of a sequence writes its new token u; the others lay out tokens of the blocks become whole."""
    batch = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1)
    wait(OVERLAPS)
    let_next_begin(OVERLAPS)
    slot = tl.load(slots_ptr + batch).to(tl.int64)
    length = tl.load(lengths_ptr + tl.maximum(slot, 0))
    end = tl.where(slot >= 0, length + new, 0)
    in_k = tl.arange(0, BLOCK_K)
    in_v = tl.arange(0, BLOCK_V)
    head_k, dim_k, mask_k = in_k // DK, in_k % DK, in_k < num_heads * DK
    head_v, dim_v, mask_v = in_v // DV, in_v % DV, in_v < num_heads * DV
    token = batch * new + unit
    if unit == 0:
        tl.store(ends_ptr + batch, end)
        head = tl.arange(0, HEADS_PAD)
        tl.store(arrived_ptr + batch * 2 * num_heads + head, tl.zeros_like(head), mask=head < 2 * num_heads)
        for i in tl.static_range(NUM_FRESH):
            block = num_whole(length, CMP_LEN, CMP_STRIDE) + i
            is_fresh = block < num_whole(end, CMP_LEN, CMP_STRIDE)
            cell = block + (CMP_LEN // CMP_STRIDE - 1)
            page = tl.load(page_table_ptr + slot * max_pages + cell // CELLS_SLC, mask=is_fresh, other=0)
            cell_row = tl.where(is_fresh, page * CELLS_SLC + cell % CELLS_SLC, -1)
            tl.store(cell_rows_ptr + batch * NUM_FRESH + i, cell_row)
            tl.store(block_start_ptr + batch * NUM_FRESH + i, tl.where(is_fresh, block * CMP_STRIDE, 0).to(tl.int64))
            tl.store(block_rows_ptr + batch * NUM_FRESH + i, ((batch * NUM_FRESH + i) * CMP_LEN).to(tl.int32))
    if (unit < new) & (end > 0):
        write_token(
            k_cmp_ptr, v_cmp_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, page_table_ptr + slot * max_pages,
            k_page_ptr, v_page_ptr, k_win_ring_ptr, v_win_ring_ptr, k_raw_ring_ptr, v_raw_ring_ptr,
            token, slot, length + unit, num_heads, win_ring, raw_ring, k_inverse, v_inverse,
            stride_kct, stride_kch, stride_vct, stride_vch, stride_kst, stride_ksh, stride_vst, stride_vsh,
            stride_kwt, stride_kwh, stride_vwt, stride_vwh, SLC_LEN, DK, DV, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    first = (unit - new) * UNIT_TOKENS  # counted over the blocks
    block = num_whole(length, CMP_LEN, CMP_STRIDE) + first // CMP_LEN
    if (unit >= new) & (block < num_whole(end, CMP_LEN, CMP_STRIDE)):
        for i in tl.static_range(UNIT_TOKENS):
            position = block * CMP_STRIDE + first % CMP_LEN + i
            is_new = position >= length
            raw = (slot * raw_ring + position % raw_ring) * num_heads
            token = batch * new + position - length
            to = (batch * NUM_FRESH * CMP_LEN + first + i) * num_heads
            k = _load_token(k_cmp_ptr, token, stride_kct, stride_kch, head_k, dim_k, mask_k & is_new)
            k += tl.load(k_raw_ring_ptr + raw * DK + in_k, mask=mask_k & ~is_new, other=0.0)
            tl.store(k_raw_ptr + to * DK + in_k, k, mask=mask_k)
            v = _load_token(v_cmp_ptr, token, stride_vct, stride_vch, head_v, dim_v, mask_v & is_new)
            v += tl.load(v_raw_ring_ptr + raw * DV + in_v, mask=mask_v & ~is_new, other=0.0)
            tl.store(v_raw_ptr + to * DV + in_v, v, mask=mask_v)


@launchable
@triton.jit
def _store_kernel(
    k_ptr, v_ptr, cell_rows_ptr,
    k_page_ptr, v_page_ptr,
    num_heads, k_inverse, v_inverse, stride_kt, stride_kh, stride_vt, stride_vh,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One compressed block into its page."""
    source = tl.program_id(0).to(tl.int64)
    row = tl.load(cell_rows_ptr + source).to(tl.int64) * num_heads
    if row >= 0:
        in_k = tl.arange(0, BLOCK_K)
        in_v = tl.arange(0, BLOCK_V)
        mask = in_k < num_heads * DK
        k = _load_token(k_ptr, source, stride_kt, stride_kh, in_k // DK, in_k % DK, mask)
        tl.store(k_page_ptr + row * DK + in_k, in_page(k, k_inverse, k_page_ptr), mask=mask)
        mask = in_v < num_heads * DV
        v = _load_token(v_ptr, source, stride_vt, stride_vh, in_v // DV, in_v % DV, mask)
        tl.store(v_page_ptr + row * DV + in_v, in_page(v, v_inverse, v_page_ptr), mask=mask)


@torch.no_grad()
def decode_append(
    k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    cache: PagedCache, slots: Tensor, *, sizes: DecodeSizes,
) -> Appended:  # fmt: skip
    """Write new tokens behind those of their sequences. `cache.lengths` stays; `decode_attention` takes it on.

    k_*, v_*    [B, new, Hkv, Dk or Dv]     of 1 to 8 new tokens, RoPE applied
    slots       int32 [B]                   row of page_table, lengths and rings of each sequence; -1: an empty slot.
                                            The page table has the pages for the new tokens already
    raises      ValueError on dtypes that the kernels do not take
    """
    check_dtypes(k_cmp=k_cmp, k_slc=k_slc, k_win=k_win, v_cmp=v_cmp, v_slc=v_slc, v_win=v_win, k_ring=cache.k_win)
    check_pages(cache)
    batch, new, num_heads, dim_k = k_cmp.shape
    dim_v = v_cmp.shape[3]
    assert new <= MOST_NEW
    given = [unit_stride(x).flatten(0, 1) for x in (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)]
    num_fresh = cdiv(new, sizes.cmp_stride)
    rows = batch * num_fresh * sizes.cmp_block_len
    unit_tokens = gcd(sizes.cmp_block_len, 4)
    made = Appended(
        slots.new_empty(batch),
        k_cmp.new_empty(rows, num_heads, dim_k),
        k_cmp.new_empty(rows, num_heads, dim_v),
        slots.new_empty(batch * num_fresh),
        slots.new_empty(batch * num_fresh, dtype=torch.int64),
        slots.new_empty(batch * num_fresh),
        slots.new_empty(batch, 2 * num_heads),
    )
    _append_kernel[(batch, new + num_fresh * sizes.cmp_block_len // unit_tokens)](
        *given, slots, cache.page_table, cache.lengths,
        cache.k_slc, cache.v_slc, cache.k_win, cache.v_win, cache.k_raw, cache.v_raw,
        *made,
        cache.page_table.shape[1], num_heads, cache.k_win.shape[1], cache.k_raw.shape[1], new,
        1 / cache.k_scale, 1 / cache.v_scale,
        *token_head_strides(*given),
        NUM_FRESH=num_fresh, UNIT_TOKENS=unit_tokens, HEADS_PAD=next_power_of_2(2 * num_heads),
        CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride, SLC_LEN=sizes.slc_block_len,
        CELLS_SLC=sizes.cells_slc, DK=dim_k, DV=dim_v,
        BLOCK_K=next_power_of_2(num_heads * dim_k), BLOCK_V=next_power_of_2(num_heads * dim_v), num_warps=2,
        **overlapping(slots),
    )  # fmt: skip
    return made


@torch.no_grad()
def decode_store(k: Tensor, v: Tensor, appended: Appended, cache: PagedCache) -> None:
    """Put what phi made of `appended`, [B * F, Hkv, Dk or Dv], into the pages: of blocks that have become whole."""
    num_heads, dim_k = k.shape[1:]
    dim_v = v.shape[2]
    k, v = unit_stride(k), unit_stride(v)
    _store_kernel[(len(appended.cell_rows),)](
        k, v, appended.cell_rows,
        cache.k_cmp, cache.v_cmp,
        num_heads, 1 / cache.k_scale, 1 / cache.v_scale, *token_head_strides(k, v),
        DK=dim_k, DV=dim_v, BLOCK_K=next_power_of_2(num_heads * dim_k), BLOCK_V=next_power_of_2(num_heads * dim_v),
        num_warps=2,
    )  # fmt: skip
