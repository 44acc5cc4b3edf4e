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
    imp                     fp32 [B, Hkv, rows, layers, pages]      tile_max fp32 [B, Hkv, rows, tiles]
                            pages: those of a table, up to whole tiles
Source      Yuan et al. 2025, arXiv:2502.11089, eq. 8 and 9; Milakov & Gimelshein 2018, arXiv:1805.02867
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.overlap import let_next_begin
from nsa_kernels.common.sizes import cdiv
from nsa_kernels.decode.append import num_whole
from nsa_kernels.decode.online import attend, load_queries
from nsa_kernels.decode.tiles import Split

LOG2_E = 1.4426950408889634


class CompressedParts(NamedTuple):
    """What the splits leave."""

    maximum: Tensor
    total: Tensor
    out: Tensor
    importance: Tensor
    tile_max: Tensor

    @classmethod
    def empty(cls, rows: tuple[int, ...], num_layers: int, max_pages: int, dim_v: int, cut: Split, like: Tensor):
        splits, tiles = (cut.num_splits,), cdiv(max_pages, cut.tile_pages)
        shapes = splits, splits, (*splits, dim_v), (num_layers, tiles * cut.tile_pages), (tiles,)
        return cls(*(like.new_empty(*rows, *shape, dtype=torch.float32) for shape in shapes))


@triton.jit
def compressed_split(
    q_ptr, k_ptr, v_ptr, table, where, max_ptr, sum_ptr, out_ptr, imp_ptr, tile_max_ptr,
    batch, head, split, row, end, new, num_heads, num_splits, num_tiles, scale, stride_qt, stride_qh,
    G: tl.constexpr, BLOCK_M: tl.constexpr,
    CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr,
    SLC_PAD: tl.constexpr, NUM_LAYERS: tl.constexpr, TILE_PAGES: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr, PAGES_AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The rows `row` [BLOCK_M] of a split that has cells.

    table, where    the sequence's row of the page table; with PAGES_AHEAD what it says of the split's only tile, a page
                    a column
    """
    num_cells = num_whole(end, CMP_LEN, CMP_STRIDE) + CELLS_CMP - 1
    num_pages = tl.cdiv(num_cells, CELLS_SLC)
    num_rows = new * G
    token = row // G
    seen = num_whole(end - new + 1 + token, CMP_LEN, CMP_STRIDE)  # [BLOCK_M]
    seen = tl.where(row < num_rows, seen, 0)
    token = tl.minimum(token, new - 1)
    q_rows = q_ptr + (batch * new + token)[:, None] * stride_qt + (head * G + row % G)[:, None] * stride_qh
    q_a, q_b = load_queries(q_rows, DK_A, DK_B)

    # Cells of a tile by residue slowly and page fast, so that the S cells of a page lie in one thread's registers.
    column = tl.arange(0, SLC_PAD * TILE_PAGES)
    residue = column // TILE_PAGES
    cell_residue = tl.arange(0, SLC_PAD)[None, :, None]
    tile_page = tl.arange(0, TILE_PAGES)
    state = (batch * num_heads + head) * num_rows + row  # [BLOCK_M]
    live = row < num_rows
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    last = tl.minimum((split + 1) * SPLIT_PAGES, num_pages)
    imp_pages = num_tiles * TILE_PAGES
    for first in tl.range(split * SPLIT_PAGES, last, TILE_PAGES):
        page = first + column % TILE_PAGES
        block = page * CELLS_SLC + residue - (CELLS_CMP - 1)  # the compressed block of each column
        there = (residue < CELLS_SLC) & (block >= 0) & (page < num_pages) & (block < num_cells - (CELLS_CMP - 1))
        at_page = where
        if not PAGES_AHEAD:
            at_page = tl.load(table + page, mask=page < num_pages, other=0)
        at = (at_page.to(tl.int64) * CELLS_SLC + residue) * num_heads + head
        m, total, acc, p = attend(
            q_a, q_b, k_ptr + at * (DK_A + DK_B), v_ptr + at * DV, there,
            there[None, :] & (block[None, :] < seen[:, None]), scale, m, total, acc, DK_A, DK_B, DV, PRECISION,
        )  # fmt: skip

        tl.store(tile_max_ptr + state * num_tiles + first // TILE_PAGES, m, mask=live)
        shares = tl.reshape(p, [BLOCK_M, SLC_PAD, TILE_PAGES])
        to = imp_ptr + (state * NUM_LAYERS * imp_pages)[:, None] + (first + tile_page)[None, :]
        stored = live[:, None] & (first + tile_page < num_pages)[None, :]
        for layer in tl.static_range(NUM_LAYERS):
            # Eq. 9 for offset k = r + layer * S - (l/d - 1) from the first row of block p - layer.
            offset = cell_residue + (layer * CELLS_SLC - (CELLS_CMP - 1))
            cells = tl.minimum(offset + CELLS_CMP, CELLS_SLC) - tl.maximum(offset, 0)
            weight = tl.where(cell_residue < CELLS_SLC, tl.maximum(cells, 0), 0).to(tl.float32)
            # -0.0, unlike 0.0, is what the compiler may leave out of a sum.
            share = tl.sum(tl.where(weight > 0, shares * weight, -0.0), 1)  # [BLOCK_M, TILE_PAGES]
            tl.store(to + layer * imp_pages, share, mask=stored)
    let_next_begin(OVERLAPS)
    part = state * num_splits + split
    tl.store(max_ptr + part, m, mask=live)
    tl.store(sum_ptr + part, total, mask=live)
    tl.store(out_ptr + part[:, None] * DV + tl.arange(0, DV)[None, :], acc, mask=live[:, None])
