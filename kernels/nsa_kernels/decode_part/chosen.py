"""Attention to those of the chosen blocks that are in this part, and to the window; the choice is made on the way.

As `decode.chosen`: programs share out the n chosen blocks, in ascending order, and those of the window. Each program of
the first kind finds the n best of all candidates: the best of each part, or of each chunk where a part has candidates
of all blocks, and then the window is not for these programs. Blocks of other parts are passed over; what has no key
leaves m = -inf and sum = 0.

Shapes
    part_max, part_sum      fp32 [B, new, Hq, programs]     part_out fp32 [B, new, Hq, programs, Dv]
    block_indices           int32 [B, new, Hkv, n], of each sequence from 0, ascending, -1 for none
Source      Yuan et al. 2025, arXiv:2502.11089, eq. 11 and 12, section 3.3.3
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2, split_head_dim
from nsa_kernels.common.tiles import dot_precision
from nsa_kernels.decode.candidates import FAR, best_of, ids_of
from nsa_kernels.decode.compressed import LOG2_E
from nsa_kernels.decode.online import attend, load_queries
from nsa_kernels.decode.tiles import CANDIDATES, blocks_of_part, candidate_rows, chosen_options
from nsa_kernels.decode_contracts import DecodeSizes, PagedCache
from nsa_kernels.selection.top import merge_sorted


class ChosenParts(NamedTuple):
    """What the programs leave; the first `slc_programs` of them are of chosen blocks, the others of the window."""

    maximum: Tensor
    total: Tensor
    out: Tensor
    block_indices: Tensor
    slc_programs: int


@launchable
@triton.jit
def _part_chosen_kernel(
    q_ptr, k_page_ptr, v_page_ptr, k_win_ptr, v_win_ptr, candidates_ptr, slots_ptr, page_table_ptr, ends_ptr,
    max_ptr, sum_ptr, out_ptr, block_indices_ptr,
    new, num_heads, max_pages, num_queries, num_chunks, win_ring, num_programs, scale, stride_qt, stride_qh,
    G: tl.constexpr, G_PAD: tl.constexpr, SLC_LEN: tl.constexpr, WINDOW: tl.constexpr, NUM_CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr, NUM_PARTS: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr,
    ROWS: tl.constexpr, WITH_WINDOW: tl.constexpr, SLC_PROGRAMS: tl.constexpr, PROGRAM_BLOCKS: tl.constexpr,
    DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CHUNK: blocks of a chunk of candidates, whose lists follow one another; 0: candidates are those of NUM_PARTS."""
    program = tl.program_id(0)
    head = tl.program_id(1) % num_heads
    query = (tl.program_id(1) // num_heads).to(tl.int64)  # sequence * new + token
    batch = query // new
    slot = tl.load(slots_ptr + batch).to(tl.int64)
    end = tl.load(ends_ptr + batch)
    position = end - new + (query % new).to(tl.int32)
    own = tl.where(end > 0, position // SLC_LEN, -1)
    win_first = tl.maximum(position - (WINDOW - 1), 0)
    is_win = program >= SLC_PROGRAMS
    win_blocks = tl.where(end > 0, tl.cdiv(position + 1 - win_first, SLC_LEN), 0)
    num_blocks = tl.where(is_win, win_blocks, tl.minimum(own + 1, NUM_CHOSEN))
    start = tl.where(is_win, program - SLC_PROGRAMS, program) * PROGRAM_BLOCKS
    g = tl.arange(0, G_PAD)
    live = g < G
    to = ((query * num_heads + head) * G + g) * num_programs + program
    rank = tl.arange(0, CHOSEN_PAD)[None, :]
    to_ids = block_indices_ptr + (query * num_heads + head) * NUM_CHOSEN + rank
    m = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    if start >= num_blocks:
        tl.store(max_ptr + to, m, mask=live)
        tl.store(sum_ptr + to, total, mask=live)
        if program == 0:
            tl.store(to_ids, tl.full([1, CHOSEN_PAD], -1, tl.int32), mask=rank < NUM_CHOSEN)
        return

    block_ids = tl.zeros([1, CHOSEN_PAD], tl.int32)
    if program < SLC_PROGRAMS:
        if CHUNK > 0:
            keys = candidates_ptr + (query * num_heads + head) * num_chunks * CHOSEN_PAD
            best = best_of(keys, (own // CHUNK + 1) * CHOSEN_PAD, CHOSEN_PAD, CANDIDATES, ROWS)
        else:
            best = tl.full([1, CHOSEN_PAD], -1, tl.int64)  # descending; -1: none
            for part in tl.static_range(NUM_PARTS):
                keys = candidates_ptr + ((part * num_queries + query) * num_heads + head) * CHOSEN_PAD
                best = merge_sorted(best, tl.load(keys + rank))
        block_ids = ids_of(best, NUM_CHOSEN)
        if program == 0:
            tl.store(to_ids, tl.where(block_ids < FAR, block_ids, -1), mask=rank < NUM_CHOSEN)

    q_rows = q_ptr + query * stride_qt + (head * G + tl.minimum(g, G - 1))[:, None] * stride_qh
    q_a, q_b = load_queries(q_rows, DK_A, DK_B)
    in_block = tl.arange(0, SLC_LEN)
    k_ptr, v_ptr = k_page_ptr, v_page_ptr
    if WITH_WINDOW:  # pages of 8 bits are of another dtype
        k_ptr = tl.where(is_win, k_win_ptr, k_page_ptr)
        v_ptr = tl.where(is_win, v_win_ptr, v_page_ptr)
    acc = tl.zeros([G_PAD, DV], tl.float32)
    for i in tl.range(start, tl.minimum(start + PROGRAM_BLOCKS, num_blocks)):
        block = tl.sum(tl.where(rank == i, block_ids, 0))  # 0 in the window
        token = tl.where(is_win, win_first + i * SLC_LEN, block * SLC_LEN) + in_block
        page = tl.load(page_table_ptr + slot * max_pages + block).to(tl.int64)
        there = (token <= position) & (is_win | (page >= 0))
        row = tl.where(is_win, slot * win_ring + token % win_ring, page * SLC_LEN + in_block)
        at = row * num_heads + head
        m, total, acc, _ = attend(
            q_a, q_b, k_ptr + at * (DK_A + DK_B), v_ptr + at * DV, there, there[None, :],
            scale, m, total, acc, DK_A, DK_B, DV, PRECISION,
        )  # fmt: skip
    tl.store(max_ptr + to, m, mask=live)
    tl.store(sum_ptr + to, total, mask=live)
    tl.store(out_ptr + to[:, None] * DV + tl.arange(0, DV)[None, :], acc, mask=live[:, None])


def attend_chosen_here(
    q: Tensor, candidates: Tensor, cache: PagedCache, slots: Tensor, ends: Tensor, sizes: DecodeSizes,
    softmax_scale: float, chunk: int = 0,
) -> ChosenParts:  # fmt: skip
    """q [B, new, Hq, Dk], its last stride 1.

    candidates  contiguous [parts, B, new, Hkv, n_pad], the best of each part, and the window is attended to as well;
                or with `chunk` blocks to each, [B, new, Hkv, chunks, n_pad]
    """
    batch, new, num_q_heads, dim_k = q.shape
    num_heads, dim_v = cache.v_slc.shape[2:]
    chosen_pad, most = candidates.shape[4], max(CANDIDATES, candidates.shape[4])
    group, queries = num_q_heads // num_heads, batch * new * num_heads
    blocks = blocks_of_part(queries, sizes.num_slc_blocks)
    slc_programs = cdiv(sizes.num_slc_blocks, blocks)
    win_programs = 0 if chunk else cdiv(cdiv(sizes.window_len, sizes.slc_block_len), blocks)
    num_programs = slc_programs + win_programs
    rows = (batch, new, num_q_heads, num_programs)
    made = ChosenParts(
        q.new_empty(*rows, dtype=torch.float32),
        q.new_empty(*rows, dtype=torch.float32),
        q.new_empty(*rows, dim_v, dtype=torch.float32),
        ends.new_empty(batch, new, num_heads, sizes.num_slc_blocks),
        slc_programs,
    )
    num_lists = candidates.shape[3] if chunk else len(candidates)
    dk_a, dk_b = split_head_dim(dim_k)
    packed = q.flatten(0, 1)
    _part_chosen_kernel[(num_programs, queries)](
        packed, cache.k_slc, cache.v_slc, cache.k_win, cache.v_win, candidates, slots, cache.page_table, ends,
        *made[:4],
        new, num_heads, cache.page_table.shape[1], batch * new, num_lists, cache.k_win.shape[1], num_programs,
        softmax_scale * cache.k_scale * LOG2_E, *packed.stride()[:2],
        G=group, G_PAD=max(16, next_power_of_2(group)), SLC_LEN=sizes.slc_block_len, WINDOW=sizes.window_len,
        NUM_CHOSEN=sizes.num_slc_blocks, CHOSEN_PAD=chosen_pad, NUM_PARTS=0 if chunk else num_lists, CHUNK=chunk,
        CANDIDATES=most, ROWS=candidate_rows(queries, num_lists * chosen_pad, most), WITH_WINDOW=win_programs > 0,
        SLC_PROGRAMS=slc_programs, PROGRAM_BLOCKS=blocks,
        DK_A=dk_a, DK_B=dk_b, DV=dim_v, PRECISION=dot_precision(q.dtype),
        **(chosen_options(q.dtype, queries) if chunk else chosen_options(q.dtype)),
    )  # fmt: skip
    return made
