"""The best blocks of a part, by importances that are whole once lse is merged over all parts.

    imp[t, h, j] = sum_g 2 ** (tile_max - lse[t, g]) * imp[g, i]        j = first + i * step

lse, in powers of 2, is merged over the parts in ascending order, alike for each part. Blocks are ordered by keys of
int64 as in `decode.candidates`; first the best of each chunk are found, then the best of those.

Shapes      n_pad = the power of two from n on
    of chunks   int64 [B, new, Hkv, chunks, n_pad], descending, -1 for none
    returned    int64 [B, new, Hkv, n_pad], likewise
Source      Yuan et al. 2025, arXiv:2502.11089, eq. 9 to 12
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.decode.append import num_whole
from nsa_kernels.decode.candidates import best_of, first_keys, keys_of
from nsa_kernels.decode.tiles import CANDIDATE_WARPS, CANDIDATES, Split
from nsa_kernels.decode_contracts import DecodeSizes
from nsa_kernels.decode_part.compressed import PartScores
from nsa_kernels.decode_part.part import CachePart


@launchable
@triton.jit
def _part_candidates_kernel(
    lse_ptr, imp_ptr, tile_max_ptr, slots_ptr, first_ptr, ends_ptr,
    candidates_ptr,
    new, num_heads, max_here, step, num_tiles, num_chunks, num_rows,
    G: tl.constexpr, G_PAD: tl.constexpr, CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr,
    CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr, SLC_LEN: tl.constexpr,
    NUM_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr,
    TILE_PAGES: tl.constexpr, CHUNK_TILES: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
):  # fmt: skip
    """A chunk is CHUNK_TILES tiles of pages, of which each row's importances have one scale."""
    chunk = tl.program_id(0)
    head = tl.program_id(1) % num_heads
    query = (tl.program_id(1) // num_heads).to(tl.int64)  # sequence * new + token
    batch, token = query // new, (query % new).to(tl.int32)
    end = tl.load(ends_ptr + batch)
    first_page = tl.load(first_ptr + tl.maximum(tl.load(slots_ptr + batch), 0))
    own = tl.where(end > 0, (end - new + token) // SLC_LEN, -1)
    to = candidates_ptr + ((query * num_heads + head) * num_chunks + chunk) * CHOSEN_PAD
    to += tl.arange(0, CHOSEN_PAD)[None, :]
    if first_page + chunk * (CHUNK_TILES * TILE_PAGES) * step > own:
        tl.store(to, tl.full([1, CHOSEN_PAD], -1, tl.int64))
        return
    num_blocks = tl.where(end >= CMP_LEN, num_whole(end, CMP_LEN, CMP_STRIDE), 0)
    num_pages = tl.where(num_blocks > 0, tl.cdiv(num_blocks + CELLS_CMP - 1, CELLS_SLC), 0)
    num_here = tl.maximum(num_pages - first_page + step - 1, 0) // step

    g = tl.arange(0, G_PAD)
    live = g < G
    parts = tl.arange(0, PARTS_PAD)[None, :]
    at = (query * num_heads + head) * G + g[:, None] + parts * num_rows
    lses = tl.load(lse_ptr + at, mask=live[:, None] & (parts < NUM_PARTS), other=float("-inf"))
    m = tl.max(lses, 1)
    base = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp2(lses - base[:, None]), 1)
    lse = tl.where(total > 0, base + tl.log2(total), float("inf"))

    state = (batch * num_heads + head) * (new * G) + token * G + g
    tile = chunk * CHUNK_TILES + tl.arange(0, CHUNK_TILES)
    here = tile[:, None] * TILE_PAGES + tl.arange(0, TILE_PAGES)[None, :]  # [CHUNK_TILES, TILE_PAGES]
    block = first_page + here * step
    used = live[:, None] & (tile * TILE_PAGES < num_here)[None, :]
    tile_max = tl.load(tile_max_ptr + (state * num_tiles)[:, None] + tile[None, :], mask=used, other=float("-inf"))
    scale = tl.exp2(tile_max - lse[:, None])
    there = live[:, None, None] & (here < num_here)[None, :, :]
    imp = tl.load(imp_ptr + (state * max_here)[:, None, None] + here[None, :, :], mask=there, other=0.0)
    importance = tl.sum(imp * scale[:, :, None], 0)
    key = keys_of(block, importance, own, NUM_INIT, NUM_LOCAL)
    tl.store(to, tl.topk(tl.reshape(key, [1, CHUNK_TILES * TILE_PAGES]), CHOSEN_PAD))


@launchable
@triton.jit
def _best_kernel(candidates_ptr, best_ptr, count, CANDIDATES: tl.constexpr, CHOSEN_PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    keys = first_keys(candidates_ptr + row * count, count, CANDIDATES, 1)
    best = best_of(keys, candidates_ptr + row * count, count, CHOSEN_PAD, CANDIDATES, 1)
    tl.store(best_ptr + row * CHOSEN_PAD + tl.arange(0, CHOSEN_PAD)[None, :], best)


def candidates_of_part(
    scores: PartScores, lses: Tensor, part: CachePart, slots: Tensor, ends: Tensor, new: int, cut: Split,
    sizes: DecodeSizes, chunk: int,
) -> Tensor:  # fmt: skip
    """lses [parts, B * new * Hq], contiguous; chunk: pages of a chunk, whole tiles."""
    batch, num_heads, rows, _ = scores.maximum.shape
    group, chosen_pad = rows // new, max(2, next_power_of_2(sizes.num_slc_blocks))
    num_chunks = cdiv(part.max_pages, chunk)
    found = ends.new_empty(batch, new, num_heads, num_chunks, chosen_pad, dtype=torch.int64)
    _part_candidates_kernel[(num_chunks, batch * new * num_heads)](
        lses, scores.importance, scores.tile_max, slots, part.first, ends,
        found,
        new, num_heads, part.max_pages, part.step, scores.tile_max.shape[3], num_chunks, lses.shape[1],
        G=group, G_PAD=next_power_of_2(group), CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride,
        CELLS_CMP=sizes.cells_cmp, CELLS_SLC=sizes.cells_slc, SLC_LEN=sizes.slc_block_len,
        NUM_PARTS=len(lses), PARTS_PAD=next_power_of_2(len(lses)),
        TILE_PAGES=cut.tile_pages, CHUNK_TILES=chunk // cut.tile_pages,
        NUM_INIT=sizes.num_init_blocks, NUM_LOCAL=sizes.num_local_blocks, CHOSEN_PAD=chosen_pad,
        num_warps=CANDIDATE_WARPS,
    )  # fmt: skip
    if num_chunks == 1:
        return found.squeeze(3)
    best = found.new_empty(batch, new, num_heads, chosen_pad)
    _best_kernel[(batch * new * num_heads,)](
        found, best, num_chunks * chosen_pad, CANDIDATES=max(CANDIDATES, chosen_pad), CHOSEN_PAD=chosen_pad, num_warps=4
    )
    return best
