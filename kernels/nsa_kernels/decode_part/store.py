"""What phi made of blocks that have become whole: into the pages of this part, and once more behind the page before.

Block i is the cell i + l/d - 1 of its sequence, so in page (i + l/d - 1) // S, S = l'/d. It goes there if that page is
here; its key, if it is one of the first l/d - 1 of its page, to `following` if the page before is here.

Of a `TokenPart` it goes to that page in any case, through decoding's own phi or `decode_store`: `all_cells` says where.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.rows import token_head_strides, unit_stride
from nsa_kernels.common.sizes import next_power_of_2
from nsa_kernels.decode.append import num_whole
from nsa_kernels.decode_contracts import Appended, DecodeSizes
from nsa_kernels.decode_part.part import CachePart, TokenPart, cells_following


@triton.jit
def _fresh_cell(
    source, slots_ptr, ends_ptr, new, num_fresh, CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr,
    CELLS_CMP: tl.constexpr,
):  # fmt: skip
    """Of the `source`th compressed block that may have become whole: the slot of its sequence, its cell there, and
    whether it has."""
    batch = source // num_fresh
    slot = tl.load(slots_ptr + batch).to(tl.int64)
    end = tl.load(ends_ptr + batch)
    block = num_whole(end - new, CMP_LEN, CMP_STRIDE) + (source % num_fresh).to(tl.int32)
    is_fresh = (end > 0) & (block < num_whole(end, CMP_LEN, CMP_STRIDE))
    return slot, block + (CELLS_CMP - 1), is_fresh


@launchable
@triton.jit
def _part_store_kernel(
    k_ptr, v_ptr, slots_ptr, ends_ptr, page_table_ptr, following_table_ptr,
    k_page_ptr, v_page_ptr, following_ptr,
    new, num_fresh, max_pages, num_heads, stride_kt, stride_kh, stride_vt, stride_vh,
    CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr,
    FOLLOWING: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(0).to(tl.int64)
    slot, cell, is_fresh = _fresh_cell(source, slots_ptr, ends_ptr, new, num_fresh, CMP_LEN, CMP_STRIDE, CELLS_CMP)
    if is_fresh == 0:
        return
    at = slot * max_pages + cell // CELLS_SLC
    residue = cell % CELLS_SLC
    page = tl.load(page_table_ptr + at).to(tl.int64)
    in_k = tl.arange(0, BLOCK_K)
    in_v = tl.arange(0, BLOCK_V)
    mask_k = in_k < num_heads * DK
    mask_v = in_v < num_heads * DV
    k = tl.load(k_ptr + source * stride_kt + in_k // DK * stride_kh + in_k % DK, mask=mask_k, other=0.0)
    v = tl.load(v_ptr + source * stride_vt + in_v // DV * stride_vh + in_v % DV, mask=mask_v, other=0.0)
    row = (page * CELLS_SLC + residue) * num_heads
    tl.store(k_page_ptr + row * DK + in_k, k.to(k_page_ptr.dtype.element_ty), mask=mask_k & (page >= 0))
    tl.store(v_page_ptr + row * DV + in_v, v.to(v_page_ptr.dtype.element_ty), mask=mask_v & (page >= 0))
    if FOLLOWING > 0:
        behind = tl.load(following_table_ptr + at).to(tl.int64)
        kept = (behind >= 0) & (residue < FOLLOWING)
        row = (behind * FOLLOWING + residue) * num_heads
        tl.store(following_ptr + row * DK + in_k, k.to(following_ptr.dtype.element_ty), mask=mask_k & kept)


@torch.no_grad()
def part_store(
    k: Tensor, v: Tensor, appended: Appended, part: CachePart, slots: Tensor, new: int, *, sizes: DecodeSizes
) -> None:
    """Put what phi made of `appended`, [B * F, Hkv, Dk or Dv], where this part has it.

    new     tokens that `decode_append` added to each sequence
    """
    num_heads, dim_k = k.shape[1:]
    dim_v = v.shape[2]
    k, v = unit_stride(k), unit_stride(v)
    _part_store_kernel[(len(k),)](
        k, v, slots, appended.ends, part.cache.page_table, part.following_table,
        part.cache.k_cmp, part.cache.v_cmp, part.following,
        new, len(k) // len(slots), part.cache.page_table.shape[1], num_heads, *token_head_strides(k, v),
        CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride, CELLS_CMP=sizes.cells_cmp, CELLS_SLC=sizes.cells_slc,
        FOLLOWING=cells_following(sizes), DK=dim_k, DV=dim_v,
        BLOCK_K=next_power_of_2(num_heads * dim_k), BLOCK_V=next_power_of_2(num_heads * dim_v), num_warps=2,
    )  # fmt: skip


@launchable
@triton.jit
def _cells_kernel(
    slots_ptr, ends_ptr, table_ptr,
    cell_rows_ptr,
    new, num_fresh, max_pages,
    CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(0).to(tl.int64)
    slot, cell, is_fresh = _fresh_cell(source, slots_ptr, ends_ptr, new, num_fresh, CMP_LEN, CMP_STRIDE, CELLS_CMP)
    page = tl.load(table_ptr + slot * max_pages + cell // CELLS_SLC, mask=is_fresh, other=0)
    tl.store(cell_rows_ptr + source, tl.where(is_fresh, page * CELLS_SLC + cell % CELLS_SLC, -1))


@torch.no_grad()
def all_cells(appended: Appended, part: TokenPart, slots: Tensor, new: int, *, sizes: DecodeSizes) -> Appended:
    """`appended`, with the rows of the flat k_cmp, v_cmp by `cmp_table`: for phi and `decode_store` on `part.whole`.

    new     tokens that `decode_append` added to each sequence
    """
    found = torch.empty_like(appended.cell_rows)
    _cells_kernel[(len(found),)](
        slots, appended.ends, part.cmp_table,
        found,
        new, len(found) // len(slots), part.cmp_table.shape[1],
        CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride, CELLS_CMP=sizes.cells_cmp, CELLS_SLC=sizes.cells_slc,
        num_warps=1,
    )  # fmt: skip
    return appended._replace(cell_rows=found)
