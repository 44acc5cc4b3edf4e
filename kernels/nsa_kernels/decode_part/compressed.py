"""Compressed attention of the new tokens to the pages of one part, in splits; and the importance of its blocks.

As `decode.compressed`, with two differences: page i of the part is page `first + i * step` of its sequence, and what
the page after it gives to its block is added here, from the keys in `following`, so an importance has one layer:

    imp[i]      sum over the cells of page i and those that follow it of w * 2 ** (score - tile_max)
    tile_max    the maximum of the rows so far and of the tile's following keys

Splits without a page leave m = -inf and sum = 0.

Shapes      rows = new * G, row r is token r // G, head r % G
    part_max, part_sum      fp32 [B, Hkv, rows, splits]         part_out fp32 [B, Hkv, rows, splits, Dv]
    imp                     fp32 [B, Hkv, rows, max_here]       tile_max fp32 [B, Hkv, rows, tiles]
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
from nsa_kernels.decode.compressed import LOG2_E
from nsa_kernels.decode.online import attend, load_queries, scores
from nsa_kernels.decode.tiles import Split, block_rows, compressed_options
from nsa_kernels.decode_contracts import DecodeSizes
from nsa_kernels.decode_part.part import CachePart, cells_following


class PartScores(NamedTuple):
    """What the splits leave."""

    maximum: Tensor
    total: Tensor
    out: Tensor
    importance: Tensor
    tile_max: Tensor


@launchable
@triton.jit
def _part_compressed_kernel(
    q_ptr, k_ptr, v_ptr, following_ptr, slots_ptr, page_table_ptr, following_table_ptr, first_ptr, ends_ptr,
    max_ptr, sum_ptr, out_ptr, imp_ptr, tile_max_ptr,
    new, num_heads, max_pages, max_here, step, num_splits, num_tiles, scale, stride_qt, stride_qh,
    G: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr,
    SLC_PAD: tl.constexpr, FOLLOWING: tl.constexpr, FOLLOWING_PAD: tl.constexpr,
    TILE_PAGES: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    split = tl.program_id(0) // num_heads // ROW_TILES
    row = tl.program_id(0) // num_heads % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + batch)
    end = tl.load(ends_ptr + batch)
    first_page = tl.load(first_ptr + tl.maximum(slot, 0))
    num_blocks = tl.where(end >= CMP_LEN, num_whole(end, CMP_LEN, CMP_STRIDE), 0)
    num_pages = tl.where(num_blocks > 0, tl.cdiv(num_blocks + CELLS_CMP - 1, CELLS_SLC), 0)
    num_here = tl.maximum(num_pages - first_page + step - 1, 0) // step
    num_rows = new * G
    live = row < num_rows
    state = (batch * num_heads + head) * num_rows + row  # [BLOCK_M]
    part = state * num_splits + split
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if split * SPLIT_PAGES >= num_here:
        tl.store(max_ptr + part, m, mask=live)
        tl.store(sum_ptr + part, total, mask=live)
        return
    token = row // G
    seen = tl.where(live, num_whole(end - new + 1 + token, CMP_LEN, CMP_STRIDE), 0)  # [BLOCK_M]

    token = tl.minimum(token, new - 1)
    q_rows = q_ptr + (batch * new + token)[:, None] * stride_qt + (head * G + row % G)[:, None] * stride_qh
    q_a, q_b = load_queries(q_rows, DK_A, DK_B)

    # Cells of a tile by residue slowly and page fast, so that the S cells of a page lie in one thread's registers.
    column = tl.arange(0, SLC_PAD * TILE_PAGES)
    residue = column // TILE_PAGES
    cell_residue = tl.arange(0, SLC_PAD)[None, :, None]
    tile_page = tl.arange(0, TILE_PAGES)
    behind_column = tl.arange(0, FOLLOWING_PAD * TILE_PAGES)
    behind_residue = behind_column // TILE_PAGES
    behind_cell = tl.arange(0, FOLLOWING_PAD)[None, :, None]
    table = page_table_ptr + slot.to(tl.int64) * max_pages
    behind_table = following_table_ptr + slot.to(tl.int64) * max_pages
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    last = tl.minimum((split + 1) * SPLIT_PAGES, num_here)
    for first in tl.range(split * SPLIT_PAGES, last, TILE_PAGES):
        here = first + column % TILE_PAGES
        page = first_page + here * step
        block = page * CELLS_SLC + residue - (CELLS_CMP - 1)  # the compressed block of each column
        there = (residue < CELLS_SLC) & (block >= 0) & (here < num_here) & (block < num_blocks)
        where = tl.load(table + page, mask=here < num_here, other=0).to(tl.int64)
        at = (where * CELLS_SLC + residue) * num_heads + head
        m, total, acc, p = attend(
            q_a, q_b, k_ptr + at * (DK_A + DK_B), v_ptr + at * DV, there,
            there[None, :] & (block[None, :] < seen[:, None]), scale, m, total, acc, DK_A, DK_B, DV, PRECISION,
        )  # fmt: skip

        # Eq. 9 for offset k = r - (l/d - 1) from the first row of its block.
        offset = cell_residue - (CELLS_CMP - 1)
        cells = tl.minimum(offset + CELLS_CMP, CELLS_SLC) - tl.maximum(offset, 0)
        weight = tl.where(cell_residue < CELLS_SLC, tl.maximum(cells, 0), 0).to(tl.float32)
        shares = tl.reshape(p, [BLOCK_M, SLC_PAD, TILE_PAGES])
        # -0.0, unlike 0.0, is what the compiler may leave out of a sum.
        share = tl.sum(tl.where(weight > 0, shares * weight, -0.0), 1)  # [BLOCK_M, TILE_PAGES]
        tile_max = m
        if FOLLOWING > 0:
            here = first + behind_column % TILE_PAGES
            page = first_page + here * step + 1
            block = page * CELLS_SLC + behind_residue - (CELLS_CMP - 1)
            there = (behind_residue < FOLLOWING) & (here < num_here) & (block < num_blocks)
            where = tl.load(behind_table + page, mask=there, other=0).to(tl.int64)
            at = (where * FOLLOWING + behind_residue) * num_heads + head
            s = scores(
                q_a, q_b, following_ptr + at * (DK_A + DK_B), there,
                there[None, :] & (block[None, :] < seen[:, None]), scale, DK_A, DK_B, PRECISION,
            )  # fmt: skip
            tile_max = tl.maximum(m, tl.max(s, 1))
            base = tl.where(tile_max == float("-inf"), 0.0, tile_max)
            shares = tl.reshape(tl.exp2(s - base[:, None]), [BLOCK_M, FOLLOWING_PAD, TILE_PAGES])
            weight = tl.where(behind_cell < FOLLOWING, CELLS_CMP - 1 - behind_cell, 0).to(tl.float32)
            share = share * tl.exp2(m - base)[:, None] + tl.sum(tl.where(weight > 0, shares * weight, -0.0), 1)
        tl.store(tile_max_ptr + state * num_tiles + first // TILE_PAGES, tile_max, mask=live)
        to = imp_ptr + (state * max_here)[:, None] + (first + tile_page)[None, :]
        tl.store(to, share, mask=live[:, None] & (first + tile_page < num_here)[None, :])
    tl.store(max_ptr + part, m, mask=live)
    tl.store(sum_ptr + part, total, mask=live)
    tl.store(out_ptr + part[:, None] * DV + tl.arange(0, DV)[None, :], acc, mask=live[:, None])


def score_part(
    q: Tensor, part: CachePart, slots: Tensor, ends: Tensor, cut: Split, sizes: DecodeSizes, softmax_scale: float
) -> PartScores:
    """q [B, new, Hq, Dk], its last stride 1."""
    batch, new, num_q_heads, dim_k = q.shape
    cache = part.cache
    num_heads, dim_v = cache.v_cmp.shape[2:]
    group = num_q_heads // num_heads
    rows = (batch, num_heads, new * group)
    splits, tiles = (cut.num_splits,), cdiv(part.max_pages, cut.tile_pages)
    shapes = splits, splits, (*splits, dim_v), (part.max_pages,), (tiles,)
    made = PartScores(*(q.new_empty(*rows, *shape, dtype=torch.float32) for shape in shapes))
    dk_a, dk_b = split_head_dim(dim_k)
    block_m = block_rows(new * group)
    row_tiles = cdiv(new * group, block_m)
    packed = q.flatten(0, 1)
    following = cells_following(sizes)
    _part_compressed_kernel[(num_heads * row_tiles * cut.num_splits, batch)](
        packed, cache.k_cmp, cache.v_cmp, part.following, slots, cache.page_table, part.following_table, part.first,
        ends,
        *made,
        new, num_heads, cache.page_table.shape[1], part.max_pages, part.step, cut.num_splits, tiles,
        softmax_scale * LOG2_E, *packed.stride()[:2],
        G=group, ROW_TILES=row_tiles, BLOCK_M=block_m,
        CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride, CELLS_CMP=sizes.cells_cmp,
        CELLS_SLC=sizes.cells_slc, SLC_PAD=next_power_of_2(sizes.cells_slc),
        FOLLOWING=following, FOLLOWING_PAD=next_power_of_2(max(1, following)),
        TILE_PAGES=cut.tile_pages, SPLIT_PAGES=cut.split_pages,
        DK_A=dk_a, DK_B=dk_b, DV=dim_v, PRECISION=dot_precision(q.dtype),
        **compressed_options(q.dtype, block_m),
    )  # fmt: skip
    return made
