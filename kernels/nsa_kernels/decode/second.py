"""The second launch of attention: candidates of each chunk of blocks, and what the first launch left of the compressed
branch and the window merged, under their gates. Neither waits for the other.

Programs    a chunk of a token and key-value head, then a row of the output each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.overlap import let_next_begin, overlapping, wait
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.decode.append import num_whole
from nsa_kernels.decode.candidates import chunk_candidates
from nsa_kernels.decode.compressed import CompressedParts
from nsa_kernels.decode.merge import merged
from nsa_kernels.decode.tiles import Split, second_warps, value_tiles
from nsa_kernels.decode.window import Parts
from nsa_kernels.decode_contracts import DecodeSizes, PagedCache


@launchable
@triton.jit
def _second_kernel(
    max_ptr, sum_ptr, out_ptr, imp_ptr, tile_max_ptr, win_max_ptr, win_sum_ptr, win_out_ptr, gates_ptr, slots_ptr,
    lengths_ptr,
    candidates_ptr, sum_of_two_ptr, arrived_ptr,
    num_queries, new, num_heads, num_tiles, num_chunks, v_scale, stride_gt, stride_gh, stride_gb,
    G: tl.constexpr, G_PAD: tl.constexpr, CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr,
    CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr, SLC_LEN: tl.constexpr, NUM_LAYERS: tl.constexpr,
    NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    TILE_PAGES: tl.constexpr, CHUNK_TILES: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    CHOSEN_PAD: tl.constexpr, WINDOW: tl.constexpr, WIN_TOKENS: tl.constexpr, WIN_PARTS: tl.constexpr,
    WIN_PAD: tl.constexpr, MERGED: tl.constexpr, DV: tl.constexpr, V_TILES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_candidates = num_queries * num_heads * num_chunks
    is_merge = program >= num_candidates
    of_query = tl.where(is_merge, num_heads * G, num_heads * num_chunks)
    program = tl.where(is_merge, program - num_candidates, program)
    query = (program // of_query).to(tl.int64)  # sequence * new + token
    program = program % of_query
    batch, token = query // new, (query % new).to(tl.int32)
    # The first launch, which began after all before it, writes neither slots nor lengths: they are read while it ends.
    slot = tl.load(slots_ptr + batch, cache_modifier=".cg")
    length = tl.load(lengths_ptr + tl.maximum(slot, 0), cache_modifier=".cg")
    end = tl.where(slot >= 0, length + new, 0)
    wait(OVERLAPS)
    let_next_begin(OVERLAPS)
    position = tl.where(end > 0, end - new + token, -1)
    if is_merge:
        if end > 0:
            gates = gates_ptr + query * stride_gt + program * stride_gh
            gate_cmp = tl.load(gates).to(tl.float32)
            gate_win = tl.load(gates + 2 * stride_gb).to(tl.float32)
            num_cells = tl.where(end >= CMP_LEN, num_whole(end, CMP_LEN, CMP_STRIDE) + CELLS_CMP - 1, 0)
            splits = tl.cdiv(tl.cdiv(num_cells, CELLS_SLC), SPLIT_PAGES)
            row = (batch * num_heads + program // G) * (new * G) + token * G + program % G
            out = gate_cmp * v_scale * merged(max_ptr, sum_ptr, out_ptr, row, splits, NUM_SPLITS, MERGED, DV)
            parts = tl.cdiv(tl.minimum(position + 1, WINDOW), WIN_TOKENS)
            row = query * (num_heads * G) + program
            out += gate_win * merged(win_max_ptr, win_sum_ptr, win_out_ptr, row, parts, WIN_PARTS, WIN_PAD, DV)
            tl.store(sum_of_two_ptr + row * DV + tl.arange(0, DV), out)
            if program % G == 0:
                counters = arrived_ptr + (query * num_heads + program // G) * V_TILES
                tl.store(counters + tl.arange(0, V_TILES), tl.zeros([V_TILES], tl.int32))
    else:
        own = tl.where(position >= 0, position // SLC_LEN, -1)
        chunk = program % num_chunks
        if chunk * (CHUNK_TILES * TILE_PAGES) <= own:
            chunk_candidates(
                max_ptr, sum_ptr, imp_ptr, tile_max_ptr, candidates_ptr,
                chunk, query, program // num_chunks, batch, token, end, own, new, num_heads, num_tiles, num_chunks,
                G, G_PAD, CMP_LEN, CMP_STRIDE, CELLS_CMP, CELLS_SLC, NUM_LAYERS, NUM_SPLITS, SPLITS, SPLIT_PAGES,
                TILE_PAGES, CHUNK_TILES, NUM_INIT, NUM_LOCAL, CHOSEN_PAD,
            )  # fmt: skip


def attend_second(
    parts: CompressedParts, window: Parts, gates: Tensor, cache: PagedCache, slots: Tensor, cut: Split,
    win_blocks: int, sizes: DecodeSizes, chunk: int, chosen_pad: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Candidates; the sum of the two branches fp32 [B, new, Hq, Dv]; and zeros int32 [B, new, Hkv, tiles of values] to
    count with.

    chunk           blocks of a chunk, whole tiles
    """
    batch, new, num_q_heads, win_parts, dim_v = window.out.shape
    num_heads, num_splits = parts.maximum.shape[1], cut.num_splits
    group, queries = num_q_heads // num_heads, batch * new * num_heads
    num_tiles = parts.tile_max.shape[3]
    num_chunks = cdiv(num_tiles * cut.tile_pages, chunk)
    candidates = slots.new_empty(batch, new, num_heads, num_chunks, chosen_pad, dtype=torch.int64)
    sum_of_two = window.out.new_empty(batch, new, num_q_heads, dim_v)
    arrived = slots.new_empty(batch, new, num_heads, value_tiles(queries, dim_v))
    gates = gates.flatten(0, 1)
    _second_kernel[(queries * (num_chunks + group),)](
        *parts, *window, gates, slots, cache.lengths,
        candidates, sum_of_two, arrived,
        batch * new, new, num_heads, num_tiles, num_chunks, cache.v_scale, *gates.stride(),
        G=group, G_PAD=next_power_of_2(group), CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride,
        CELLS_CMP=sizes.cells_cmp, CELLS_SLC=sizes.cells_slc, SLC_LEN=sizes.slc_block_len, NUM_LAYERS=sizes.num_layers,
        NUM_SPLITS=num_splits, SPLITS=min(16, next_power_of_2(num_splits)), SPLIT_PAGES=cut.split_pages,
        TILE_PAGES=cut.tile_pages, CHUNK_TILES=chunk // cut.tile_pages,
        NUM_INIT=sizes.num_init_blocks, NUM_LOCAL=sizes.num_local_blocks, CHOSEN_PAD=chosen_pad,
        WINDOW=sizes.window_len, WIN_TOKENS=win_blocks * sizes.slc_block_len, WIN_PARTS=win_parts,
        WIN_PAD=next_power_of_2(win_parts), MERGED=min(8, next_power_of_2(num_splits)), DV=dim_v,
        V_TILES=arrived.shape[3], num_warps=second_warps(queries), **overlapping(gates),
    )  # fmt: skip
    return candidates, sum_of_two, arrived
