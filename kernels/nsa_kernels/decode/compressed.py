"""Compressed attention of the new tokens, split over pages in fixed places; and what it says of every block.

A program takes the (token, head) rows of a key-value head and the pages of one split. It leaves, in powers of 2,

    part_max, part_sum      m = max of softmax_scale * log2(e) * q . k, and the sum of 2 ** (score - m)
    part_out                the sum of 2 ** (score - m) * v
    imp[layer, p]           the sum over the cells r of page p of w(r, layer) * 2 ** (score - tile_max): what the page
                            gives to block p - layer, of one row, not yet divided by the softmax's sum
    tile_max                m as it was at each tile of pages; what imp of the tile is relative to

so that k is read once, though the softmax is known at the end only. Splits that begin past a sequence's end do nothing,
and what they leave is not read.

Example     32/16/64, one row, scores 0: page 0 has cells 1, 2, 3 (blocks 0, 1, 2), page 1 cells 4 .. 7. imp[0] = 6, 7
            and imp[1] = 0, 1 (cell 0 of page 0 is no block's), so block 0 has the importance 6 + 1.
Shapes      rows = new * G, row r is token r // G, head r % G
    part_max, part_sum      fp32 [B, Hkv, rows, splits]         part_out fp32 [B, Hkv, rows, splits, Dv]
    imp                     fp32 [B, Hkv, rows, layers, max_pages]      tile_max fp32 [B, Hkv, rows, tiles]
Source      Yuan et al. 2025, arXiv:2502.11089, eq. 8 and 9; Milakov & Gimelshein 2018, arXiv:1805.02867
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2, split_head_dim
from nsa_kernels.common.tiles import dot_precision
from nsa_kernels.decode.append import num_whole
from nsa_kernels.decode.tiles import Split, block_rows, compressed_options
from nsa_kernels.decode_contracts import DecodeSizes, PagedCache

LOG2_E = 1.4426950408889634


class CompressedParts(NamedTuple):
    """What the splits leave."""

    maximum: Tensor
    total: Tensor
    out: Tensor
    importance: Tensor
    tile_max: Tensor


@launchable
@triton.jit
def _compressed_kernel(
    q_ptr, k_ptr, v_ptr, slots_ptr, page_table_ptr, ends_ptr,
    max_ptr, sum_ptr, out_ptr, imp_ptr, tile_max_ptr,
    new, num_heads, max_pages, num_splits, num_tiles, scale, stride_qt, stride_qh,
    G: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr,
    SLC_PAD: tl.constexpr, NUM_LAYERS: tl.constexpr, TILE_PAGES: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    split = tl.program_id(0) // num_heads // ROW_TILES
    row = tl.program_id(0) // num_heads % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + batch)
    end = tl.load(ends_ptr + batch)
    num_cells = num_whole(end, CMP_LEN, CMP_STRIDE) + CELLS_CMP - 1
    num_cells = tl.where(end >= CMP_LEN, num_cells, 0)
    if split * SPLIT_PAGES * CELLS_SLC >= num_cells:
        return
    num_pages = tl.cdiv(num_cells, CELLS_SLC)
    num_rows = new * G
    token = row // G
    seen = num_whole(end - new + 1 + token, CMP_LEN, CMP_STRIDE)  # [BLOCK_M]
    seen = tl.where(row < num_rows, seen, 0)

    dim_a = tl.arange(0, DK_A)
    dim_b = DK_A + tl.arange(0, DK_B if DK_B else 16)
    dim_v = tl.arange(0, DV)
    token = tl.minimum(token, new - 1)
    q_rows = q_ptr + (batch * new + token)[:, None] * stride_qt + (head * G + row % G)[:, None] * stride_qh
    q_a = tl.load(q_rows + dim_a[None, :])
    q_b = q_a
    if DK_B:
        q_b = tl.load(q_rows + dim_b[None, :])

    # Cells of a tile by residue slowly and page fast, so that the S cells of a page lie in one thread's registers.
    column = tl.arange(0, SLC_PAD * TILE_PAGES)
    residue = column // TILE_PAGES
    cell_residue = tl.arange(0, SLC_PAD)[None, :, None]
    tile_page = tl.arange(0, TILE_PAGES)
    table = page_table_ptr + slot.to(tl.int64) * max_pages
    state = (batch * num_heads + head) * num_rows + row  # [BLOCK_M]
    live = row < num_rows
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    last = tl.minimum((split + 1) * SPLIT_PAGES, num_pages)
    for first in tl.range(split * SPLIT_PAGES, last, TILE_PAGES):
        page = first + column % TILE_PAGES
        block = page * CELLS_SLC + residue - (CELLS_CMP - 1)  # the compressed block of each column
        there = (residue < CELLS_SLC) & (block >= 0) & (page < num_pages) & (block < num_cells - (CELLS_CMP - 1))
        where = tl.load(table + page, mask=page < num_pages, other=0).to(tl.int64)
        at = (where * CELLS_SLC + residue) * num_heads + head
        k_rows = k_ptr + at[:, None] * (DK_A + DK_B)
        k = tl.load(k_rows + dim_a[None, :], mask=there[:, None], other=0.0)
        s = tl.dot(q_a, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, columns]
        if DK_B:
            k = tl.load(k_rows + dim_b[None, :], mask=there[:, None], other=0.0)
            s = tl.dot(q_b, tl.trans(k), s, input_precision=PRECISION)
        s = tl.where(there[None, :] & (block[None, :] < seen[:, None]), s * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        total = total * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + at[:, None] * DV + dim_v[None, :], mask=there[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

        tl.store(tile_max_ptr + state * num_tiles + first // TILE_PAGES, m, mask=live)
        shares = tl.reshape(p, [BLOCK_M, SLC_PAD, TILE_PAGES])
        to = imp_ptr + (state * (NUM_LAYERS * max_pages))[:, None] + (first + tile_page)[None, :]
        stored = live[:, None] & (first + tile_page < num_pages)[None, :]
        for layer in tl.static_range(NUM_LAYERS):
            # Eq. 9 for offset k = r + layer * S - (l/d - 1) from the first row of block p - layer.
            offset = cell_residue + (layer * CELLS_SLC - (CELLS_CMP - 1))
            cells = tl.minimum(offset + CELLS_CMP, CELLS_SLC) - tl.maximum(offset, 0)
            weight = tl.where(cell_residue < CELLS_SLC, tl.maximum(cells, 0), 0).to(tl.float32)
            # -0.0, unlike 0.0, is what the compiler may leave out of a sum.
            share = tl.sum(tl.where(weight > 0, shares * weight, -0.0), 1)  # [BLOCK_M, TILE_PAGES]
            tl.store(to + layer * max_pages, share, mask=stored)
    part = state * num_splits + split
    tl.store(max_ptr + part, m, mask=live)
    tl.store(sum_ptr + part, total, mask=live)
    tl.store(out_ptr + part[:, None] * DV + dim_v[None, :], acc, mask=live[:, None])


def attend_compressed(
    q: Tensor, cache: PagedCache, slots: Tensor, ends: Tensor, cut: Split, sizes: DecodeSizes, softmax_scale: float
) -> CompressedParts:
    """q [B, new, Hq, Dk], its last stride 1."""
    batch, new, num_q_heads, dim_k = q.shape
    num_heads, dim_v = cache.v_cmp.shape[2:]
    max_pages = cache.page_table.shape[1]
    group = num_q_heads // num_heads
    rows = (batch, num_heads, new * group)

    splits, tiles = (cut.num_splits,), cdiv(max_pages, cut.tile_pages)
    shapes = splits, splits, (*splits, dim_v), (sizes.num_layers, max_pages), (tiles,)
    parts = CompressedParts(*(q.new_empty(*rows, *shape, dtype=torch.float32) for shape in shapes))
    dk_a, dk_b = split_head_dim(dim_k)
    block_m = block_rows(new * group)
    row_tiles = cdiv(new * group, block_m)
    packed = q.flatten(0, 1)
    _compressed_kernel[(num_heads * row_tiles * cut.num_splits, batch)](
        packed, cache.k_cmp, cache.v_cmp, slots, cache.page_table, ends,
        *parts,
        new, num_heads, max_pages, cut.num_splits, tiles, softmax_scale * LOG2_E, *packed.stride()[:2],
        G=group, ROW_TILES=row_tiles, BLOCK_M=block_m,
        CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride, CELLS_CMP=sizes.cells_cmp,
        CELLS_SLC=sizes.cells_slc, SLC_PAD=next_power_of_2(sizes.cells_slc), NUM_LAYERS=sizes.num_layers,
        TILE_PAGES=cut.tile_pages, SPLIT_PAGES=cut.split_pages,
        DK_A=dk_a, DK_B=dk_b, DV=dim_v, PRECISION=dot_precision(q.dtype),
        **compressed_options(q.dtype, block_m),
    )  # fmt: skip
    return parts
