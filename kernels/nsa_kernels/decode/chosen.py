"""The third launch of attention: selected attention, the blocks being chosen on the way, and the output.

The programs of a token and key-value head take `part_blocks` chosen blocks each, in ascending order. Each sorts the
candidates again, which costs less than a launch, and the first writes down what is chosen. A program leaves m, sum and
out as `compressed` does; the one that comes last merges those of all, in their order, adds what the second launch left,
and writes the output. Which one that is has no part in the result. Where there are few programs, values are cut in two
tiles, each with programs, a counter and its half of the output: what the last one reads is then half as long.

Shapes
    max, sum            fp32 [B, new, Hq, parts]        out     fp32 [B, new, Hq, parts, Dv]
    block_indices       int32 [B, new, Hkv, n], of each sequence from 0, ascending, -1 for none
Source      Yuan et al. 2025, arXiv:2502.11089, eq. 11 and 12
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.overlap import overlapping, wait
from nsa_kernels.common.sizes import cdiv, next_power_of_2, split_head_dim
from nsa_kernels.common.tiles import dot_precision
from nsa_kernels.decode.candidates import FAR, best_of, first_keys, ids_of
from nsa_kernels.decode.compressed import LOG2_E
from nsa_kernels.decode.online import attend, load_queries
from nsa_kernels.decode.tiles import CANDIDATES, blocks_of_part, candidate_rows, third_options
from nsa_kernels.decode_contracts import DecodeSizes, PagedCache


@triton.jit
def _merged_parts(
    max_ptr, sum_ptr, out_ptr, rows, dim, num_used,
    NUM_PARTS: tl.constexpr, M: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """[M, BLOCK_V] of rows [M] and values `dim` [1, BLOCK_V]; read from where all programs see them, not from what a
    multiprocessor holds."""
    m = tl.full([M], float("-inf"), tl.float32)
    for part in tl.static_range(NUM_PARTS):
        at = rows * NUM_PARTS + part
        mask = part + tl.zeros_like(rows) < num_used
        m = tl.maximum(m, tl.load(max_ptr + at, mask=mask, other=float("-inf"), cache_modifier=".cg"))
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_V], tl.float32)
    for part in tl.static_range(NUM_PARTS):
        at = rows * NUM_PARTS + part
        mask = part + tl.zeros_like(rows) < num_used
        weight = tl.exp2(tl.load(max_ptr + at, mask=mask, other=float("-inf"), cache_modifier=".cg") - m)
        total += weight * tl.load(sum_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        out = tl.load(out_ptr + at[:, None] * DV + dim, mask=mask[:, None], other=0.0, cache_modifier=".cg")
        acc += weight[:, None] * out
    return acc / total[:, None]


@launchable
@triton.jit
def _chosen_kernel(
    q_ptr, k_page_ptr, v_page_ptr, candidates_ptr, sum_of_two_ptr, gates_ptr, slots_ptr, page_table_ptr, ends_ptr,
    max_ptr, sum_ptr, out_parts_ptr, block_indices_ptr, arrived_ptr, out_ptr, lengths_ptr,
    new, num_heads, max_pages, num_chunks, scale, v_scale, stride_qt, stride_qh, stride_gt, stride_gh, stride_gb,
    G: tl.constexpr, G_PAD: tl.constexpr, SLC_LEN: tl.constexpr, NUM_CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr, ROWS: tl.constexpr,
    NUM_PARTS: tl.constexpr, PART_BLOCKS: tl.constexpr, DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr,
    V_TILES: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    BLOCK_V: tl.constexpr = DV // V_TILES
    part, v_tile = tl.program_id(0) % NUM_PARTS, tl.program_id(0) // NUM_PARTS
    head = tl.program_id(1) % num_heads
    query = (tl.program_id(1) // num_heads).to(tl.int64)  # sequence * new + token
    batch = query // new
    rank = tl.arange(0, CHOSEN_PAD)[None, :]
    indices = block_indices_ptr + (query * num_heads + head) * NUM_CHOSEN + rank
    g = tl.arange(0, G_PAD)
    live = g < G
    first_v = v_tile * BLOCK_V
    dim = first_v + tl.arange(0, BLOCK_V)[None, :]
    rows = (query * num_heads + head) * G + g
    # The launches before write neither of these.
    slot = tl.load(slots_ptr + batch).to(tl.int64)
    q_rows = q_ptr + query * stride_qt + (head * G + tl.minimum(g, G - 1))[:, None] * stride_qh
    q_a, q_b = load_queries(q_rows, DK_A, DK_B)
    wait(OVERLAPS)
    end = tl.load(ends_ptr + batch)
    candidates = candidates_ptr + (query * num_heads + head) * num_chunks * CHOSEN_PAD
    keys = first_keys(candidates, num_chunks * CHOSEN_PAD, CANDIDATES, ROWS)
    if end <= 0:
        if part == 0:
            if v_tile == 0:
                tl.store(indices, tl.full([1, CHOSEN_PAD], -1, tl.int32), mask=rank < NUM_CHOSEN)
            nothing = tl.zeros([G_PAD, BLOCK_V], tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows[:, None] * DV + dim, nothing, mask=live[:, None])
        return
    position = end - new + (query % new).to(tl.int32)
    own = position // SLC_LEN
    num_blocks = tl.minimum(own + 1, NUM_CHOSEN)
    start = part * PART_BLOCKS
    if start >= num_blocks:
        return

    count = (own // CHUNK + 1) * CHOSEN_PAD
    block_ids = ids_of(best_of(keys, candidates, count, CHOSEN_PAD, CANDIDATES, ROWS), NUM_CHOSEN)
    pages = tl.load(page_table_ptr + slot * max_pages + block_ids, mask=block_ids < FAR, other=0)
    if (part == 0) & (v_tile == 0):
        tl.store(indices, tl.where(block_ids < FAR, block_ids, -1), mask=rank < NUM_CHOSEN)
    in_block = tl.arange(0, SLC_LEN)
    m = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, BLOCK_V], tl.float32)
    for i in tl.range(start, tl.minimum(start + PART_BLOCKS, num_blocks)):
        block = tl.sum(tl.where(rank == i, block_ids, 0))
        page = tl.sum(tl.where(rank == i, pages, 0)).to(tl.int64)
        there = block * SLC_LEN + in_block <= position
        at = (page * SLC_LEN + in_block) * num_heads + head
        m, total, acc, _ = attend(
            q_a, q_b, k_page_ptr + at * (DK_A + DK_B), v_page_ptr + at * DV + first_v, there, there[None, :],
            scale, m, total, acc, DK_A, DK_B, BLOCK_V, PRECISION,
        )  # fmt: skip
    to = rows * NUM_PARTS + part
    tl.store(max_ptr + to, m, mask=live)  # the same of all tiles of values
    tl.store(sum_ptr + to, total, mask=live)
    tl.store(out_parts_ptr + to[:, None] * DV + dim, acc, mask=live[:, None])

    tl.debug_barrier()  # all threads have stored before one of them says so
    counter = arrived_ptr + (query * num_heads + head) * V_TILES + v_tile
    if tl.atomic_add(counter, 1, sem="acq_rel") < tl.cdiv(num_blocks, PART_BLOCKS) - 1:
        return
    gates = gates_ptr + query * stride_gt + (head * G + g) * stride_gh + stride_gb
    gate = tl.load(gates, mask=live, other=0.0).to(tl.float32) * v_scale
    out = tl.load(sum_of_two_ptr + rows[:, None] * DV + dim, mask=live[:, None], other=0.0)
    rows = tl.minimum(rows, (query * num_heads + head) * G + (G - 1))
    used = tl.cdiv(num_blocks, PART_BLOCKS)
    out += gate[:, None] * _merged_parts(
        max_ptr, sum_ptr, out_parts_ptr, rows, dim, used, NUM_PARTS, G_PAD, DV, BLOCK_V
    )
    to = (query * num_heads + head) * G + g
    tl.store(out_ptr + to[:, None] * DV + dim, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    if (query % new == 0) & (head == 0) & (v_tile == 0):
        tl.store(lengths_ptr + slot, end)


def attend_chosen(
    q: Tensor, candidates: Tensor, chunk: int, sum_of_two: Tensor, arrived: Tensor, gates: Tensor, cache: PagedCache,
    slots: Tensor, ends: Tensor, sizes: DecodeSizes, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, new, Hq, Dv] and block_indices; writes `cache.lengths`. q [B, new, Hq, Dk], its last stride 1."""
    batch, new, num_q_heads, dim_k = q.shape
    num_heads, dim_v = cache.v_slc.shape[2:]
    num_chunks, chosen_pad = candidates.shape[3:]
    group = num_q_heads // num_heads
    queries, v_tiles = batch * new * num_heads, arrived.shape[3]
    part_blocks = blocks_of_part(queries, sizes.num_slc_blocks)
    num_parts = cdiv(sizes.num_slc_blocks, part_blocks)
    rows = batch, new, num_q_heads, num_parts
    maximum, total = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    out_parts = q.new_empty(*rows, dim_v, dtype=torch.float32)
    block_indices = ends.new_empty(batch, new, num_heads, sizes.num_slc_blocks)
    out = q.new_empty(batch, new, num_q_heads, dim_v)
    dk_a, dk_b = split_head_dim(dim_k)
    packed, gates, most = q.flatten(0, 1), gates.flatten(0, 1), max(CANDIDATES, chosen_pad)
    _chosen_kernel[(num_parts * v_tiles, queries)](
        packed, cache.k_slc, cache.v_slc, candidates, sum_of_two, gates, slots, cache.page_table, ends,
        maximum, total, out_parts, block_indices, arrived, out, cache.lengths,
        new, num_heads, cache.page_table.shape[1], num_chunks, softmax_scale * cache.k_scale * LOG2_E,
        cache.v_scale, *packed.stride()[:2], *gates.stride(),
        G=group, G_PAD=max(16, next_power_of_2(group)), SLC_LEN=sizes.slc_block_len,
        NUM_CHOSEN=sizes.num_slc_blocks, CHOSEN_PAD=chosen_pad, CHUNK=chunk, CANDIDATES=most,
        ROWS=candidate_rows(queries, num_chunks * chosen_pad, most), NUM_PARTS=num_parts, PART_BLOCKS=part_blocks,
        DK_A=dk_a, DK_B=dk_b, DV=dim_v, V_TILES=v_tiles, PRECISION=dot_precision(q.dtype),
        **third_options(q.dtype, queries), **overlapping(q),
    )  # fmt: skip
    return out, block_indices
