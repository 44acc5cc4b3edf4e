"""Selected attention, forward: blocks wait for the queries that chose them, then every query adds up its parts.

1. `gathered`, one work item of the index at a time. A block's keys and values are loaded once and meet the queries that
   chose it, the G heads of each as G tile rows, so tiles are full at any G. Each (query, block) pair leaves its own
   normalised output and log-sum-exp, a *part*, in the slot of the query: nothing is summed across queries or programs.
2. `shared`, one tile of consecutive queries at a time. Each row's first block, its own and the one before, which
   neighbours have in common, make one part, in slot 0; and the log-sum-exps of all parts become their weights.
3. `slc_parts.sum_parts`: the weighted sum of each row's parts, in the order of its list.

So a query's bits depend on its own list of blocks only: not on its tile neighbours, not on page numbers.

Shapes      T = query tokens of this chunk, n = slots, G = query heads per key-value head, H = key-value heads of it
    part        [H, T, n, G, Dv]    fp16 for 16-bit inputs, fp32 for fp32, over its largest |element|
    scale       [H, T, n, G]        fp32: what to multiply a part with; `shared` turns it into the part's weight
    part_lse    [H, T, n, G]        fp32, log2 of the sum of exponentials
Numerics    scores, softmax statistics and sums in fp32; the probabilities meet the values in the dtype of q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .slc_index import BlockIndex, is_gathered
from .slc_pages import load_page, page_strides, split_width
from .slc_parts import SMALLEST, sum_parts
from .slc_tiles import forward_tiles

NO_BLOCK = tl.constexpr(2**30)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_lists", "num_blocks", "head_start", "num_local_pages"])
def _gathered_kernel(
    q, k, v, k_remote, v_remote, block_table, entries, offsets, item_offsets, item_list,
    part, scale, part_lse,
    scale_log2, num_queries, num_heads, num_lists, num_blocks, head_start, num_local_pages, stride_table,
    stride_qt, stride_qh,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: tl.constexpr, GROUP: tl.constexpr,
    DK0: tl.constexpr, DK1: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BLOCK_LEN: tl.constexpr,
    HAS_REMOTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, ITEM_QUERIES: tl.constexpr,
):  # fmt: skip
    """One work item: a block against some of the queries that chose it."""
    item = tl.program_id(0)
    which = tl.load(item_list + item)
    if which >= num_lists:
        return
    head, block = (which // num_blocks) % num_heads, which % num_blocks
    begin = tl.load(offsets + which) + (item - tl.load(item_offsets + which)) * ITEM_QUERIES
    end = tl.minimum(begin + ITEM_QUERIES, tl.load(offsets + which + 1))
    kv_head = head_start + head
    page = tl.load(block_table + kv_head * stride_table + block)
    k0 = load_page(
        k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
        0, DK0, BLOCK_LEN, HAS_REMOTE,
    )  # fmt: skip
    if DK1 > 0:
        k1 = load_page(
            k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
            DK0, DK1, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
    v0 = load_page(
        v, v_remote, page, kv_head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
        0, DV0, BLOCK_LEN, HAS_REMOTE,
    )  # fmt: skip
    if DV1 > 0:
        v1 = load_page(
            v, v_remote, page, kv_head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
            DV0, DV1, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip

    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row = tl.arange(0, BLOCK_M)
    g = row % GROUP
    # The rows of the next tile are on their way, in registers, while this one is worked on; past the end it is the last
    # query again, and not stored.
    next_at = begin + row // GROUP
    next_row = _query_rows(q, entries, next_at, end, kv_head * GROUP + g, stride_qt, stride_qh, SLOTS)
    next_q0 = tl.load(next_row[:, None] + tl.arange(0, DK0))  # [BLOCK_M, DK0]
    if DK1 > 0:
        next_q1 = tl.load(next_row[:, None] + DK0 + tl.arange(0, DK1))
    next_row = _query_rows(q, entries, next_at + QUERIES, end, kv_head * GROUP + g, stride_qt, stride_qh, SLOTS)
    for first in tl.range(begin, end, QUERIES, num_stages=1):
        at = first + row // GROUP
        live = (at < end) & (row < QUERIES * GROUP)
        entry = tl.load(entries + tl.minimum(at, end - 1))
        q0 = next_q0
        next_q0 = tl.load(next_row[:, None] + tl.arange(0, DK0))
        if DK1 > 0:
            q1 = next_q1
            next_q1 = tl.load(next_row[:, None] + DK0 + tl.arange(0, DK1))
        next_row = _query_rows(q, entries, at + 2 * QUERIES, end, kv_head * GROUP + g, stride_qt, stride_qh, SLOTS)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BLOCK_M, BLOCK_LEN]
        if DK1 > 0:
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        top = tl.max(scores, 1) * scale_log2
        p = tl.exp2(scores * scale_log2 - top[:, None])
        total = tl.sum(p, 1)
        p = p.to(v0.dtype)
        out0 = tl.dot(p, v0, input_precision=PRECISION)  # [BLOCK_M, DV0]
        largest = tl.max(tl.abs(out0), 1)
        if DV1 > 0:
            out1 = tl.dot(p, v1, input_precision=PRECISION)
            largest = tl.maximum(largest, tl.max(tl.abs(out1), 1))
        largest = tl.maximum(largest, SMALLEST)
        factor = 1 / largest
        part_row = (head.to(tl.int64) * num_queries * SLOTS + entry) * GROUP + g
        part_at = part + part_row[:, None] * (DV0 + DV1)
        tl.store(part_at + tl.arange(0, DV0), (out0 * factor[:, None]).to(part.dtype.element_ty), mask=live[:, None])
        if DV1 > 0:
            part_at += DV0 + tl.arange(0, DV1)
            tl.store(part_at, (out1 * factor[:, None]).to(part.dtype.element_ty), mask=live[:, None])
        tl.store(scale + part_row, largest / total, mask=live)
        tl.store(part_lse + part_row, top + tl.log2(total), mask=live)


@triton.jit
def _query_rows(q, entries, at, end, q_head, stride_qt, stride_qh, SLOTS: tl.constexpr):
    """Where the query rows of entries number `at` lie; of the last entry for numbers from `end` on."""
    entry = tl.load(entries + tl.minimum(at, end - 1))
    return q + (entry // SLOTS).to(tl.int64) * stride_qt + q_head * stride_qh


@triton.jit(do_not_specialize=["num_queries", "head_start", "num_local_pages"])
def _shared_kernel(
    q, k, v, k_remote, v_remote, block_table, block_indices, position,
    part, scale, part_lse, lse,
    scale_log2, num_queries, head_start, num_local_pages, stride_table,
    stride_bt, stride_bh, stride_bn, stride_qt, stride_qh, stride_lt,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: tl.constexpr, SLOTS_P2: tl.constexpr, GROUP: tl.constexpr,
    DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    BLOCK_LEN: tl.constexpr, HAS_REMOTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of consecutive queries: the blocks they share, as one part in slot 0; then the weights of all parts."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row = tl.arange(0, BLOCK_M)
    t = tl.program_id(0) * QUERIES + row // GROUP
    head = tl.program_id(1)
    kv_head = head_start + head
    live = (t < num_queries) & (row < QUERIES * GROUP)
    t = tl.where(live, t, 0).to(tl.int64)
    q_head = kv_head * GROUP + row % GROUP

    # A row's candidates, NO_BLOCK for those it did not choose: its first block, the one before its own, and its own.
    pos = tl.load(position + t, mask=live, other=-1).to(tl.int32)
    own = tl.where(pos >= 0, pos // BLOCK_LEN, -1)
    slot = tl.arange(0, SLOTS_P2)[None, :]
    ids_row = block_indices + t * stride_bt + kv_head * stride_bh
    there = live[:, None] & (slot < SLOTS)
    ids = tl.load(ids_row[:, None] + slot * stride_bn, mask=there, other=-1)
    first = tl.load(ids_row, mask=live, other=-1)
    first = tl.where((first >= 0) & (first <= own), first, NO_BLOCK)
    before = tl.max((ids == own[:, None] - 1).to(tl.int32), 1) > 0
    before = tl.where(before & (own > 0), own - 1, NO_BLOCK)
    last = tl.max((ids == own[:, None]).to(tl.int32), 1) > 0
    last = tl.where(last & (own >= 0), own, NO_BLOCK)

    # --- blocks attended to in place, ascending; a block that a row did not choose changes nothing in it
    q_row = q + t * stride_qt + q_head * stride_qh
    q0 = tl.load(q_row[:, None] + tl.arange(0, DK0))
    if DK1 > 0:
        q1 = tl.load(q_row[:, None] + DK0 + tl.arange(0, DK1))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    block = tl.min(tl.minimum(tl.minimum(first, before), last))
    while block < NO_BLOCK:
        page = tl.load(block_table + kv_head * stride_table + block)
        k0 = load_page(
            k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
            0, DK0, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
        value = load_page(
            v, v_remote, page, kv_head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
            0, DV, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if DK1 > 0:
            k1 = load_page(
                k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
                DK0, DK1, BLOCK_LEN, HAS_REMOTE,
            )  # fmt: skip
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        # The last key that each row sees here; -1 where the row did not choose the block.
        chosen = (first == block) | (before == block) | (last == block)
        last_key = tl.where(chosen, pos - block * BLOCK_LEN, -1)
        seen = tl.arange(0, BLOCK_LEN)[None, :] <= last_key[:, None]
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * keep[:, None], input_precision=PRECISION)
        top = new_top
        first = tl.where(first == block, NO_BLOCK, first)
        before = tl.where(before == block, NO_BLOCK, before)
        last = tl.where(last == block, NO_BLOCK, last)
        block = tl.min(tl.minimum(tl.minimum(first, before), last))

    # --- slot 0: a row's first block is among these, so a row without them sees nothing
    part_row = (head.to(tl.int64) * num_queries + t) * SLOTS * GROUP + row % GROUP
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    largest = tl.maximum(tl.max(tl.abs(acc), 1), SMALLEST)
    acc = acc * (1 / largest)[:, None]
    tl.store(part + part_row[:, None] * DV + tl.arange(0, DV), acc.to(part.dtype.element_ty), mask=live[:, None])
    shared_lse = tl.where(sees, top + tl.log2(total), float("-inf"))

    # --- every part's weight
    at = part_row[:, None] + slot * GROUP
    gathered = there & is_gathered(ids, slot, own[:, None], False)
    lses = tl.load(part_lse + at, mask=gathered, other=float("-inf"))
    lses = tl.where(slot == 0, shared_lse[:, None], lses)
    scales = tl.load(scale + at, mask=gathered, other=0.0)
    scales = tl.where(slot == 0, (largest / total)[:, None], scales)
    base = tl.max(lses, 1)
    base = tl.where(base == float("-inf"), 0.0, base)
    whole = tl.sum(tl.exp2(lses - base[:, None]), 1)
    result = base + tl.log2(tl.where(whole > 0, whole, 1.0))
    tl.store(scale + at, scales * tl.exp2(lses - result[:, None]), mask=there)
    tl.store(lse + t * stride_lt + q_head, tl.where(whole > 0, result * LN2, float("-inf")), mask=live)


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    block_table: Tensor,
    block_indices: Tensor,
    position: Tensor,
    index: BlockIndex,
    out: Tensor,
    lse: Tensor,
    *,
    head_start: int,
    slc_block_len: int,
    softmax_scale: float,
) -> None:
    """Fill `out` [T, Hq, Dv] and `lse` [T, Hq] for a chunk of queries and the heads the index was built for.

    All tensors but k, v and the table are the chunk's rows, with all heads; `index` holds heads head_start onwards.
    """
    num_queries, num_slots = block_indices.shape[0], block_indices.shape[2]
    num_blocks, num_kv_heads = block_table.shape[1], k.shape[1]
    num_heads = index.num_lists // (index.num_segments * num_blocks)
    group, head_dim_v = q.shape[1] // num_kv_heads, v.shape[2]
    exact = q.dtype == torch.float32
    part_shape = (num_heads, num_queries, num_slots, group)
    part = torch.empty(*part_shape, head_dim_v, dtype=torch.float32 if exact else torch.float16, device=q.device)
    scale, part_lse = (torch.empty(part_shape, dtype=torch.float32, device=q.device) for _ in range(2))

    tiles = forward_tiles(group, q.shape[2], head_dim_v)
    dk0, dk1 = split_width(q.shape[2])
    # Half the columns at a time take half the shared memory on their way out: three programs per SM instead of two.
    dv0, dv1 = (head_dim_v // 2, head_dim_v // 2) if head_dim_v >= 128 else (head_dim_v, 0)
    pages = (*page_strides(k, k_remote), *page_strides(v, v_remote))
    num_local_pages = k.shape[0] // slc_block_len
    shape = {
        "SLOTS": num_slots,
        "GROUP": group,
        "DK0": dk0,
        "DK1": dk1,
        "BLOCK_LEN": slc_block_len,
        "HAS_REMOTE": k_remote is not None,
        "PRECISION": "ieee" if exact else "tf32",
    }
    scale_log2 = softmax_scale * LOG2E
    _gathered_kernel[(index.max_items,)](
        q, k, v, k_remote, v_remote, block_table, index.entries, index.offsets, index.item_offsets, index.item_list,
        part, scale, part_lse,
        scale_log2, num_queries, num_heads, index.num_lists, num_blocks, head_start, num_local_pages,
        block_table.stride(0), *q.stride()[:2], *pages,
        **shape, DV0=dv0, DV1=dv1, BLOCK_M=tiles.rows, ITEM_QUERIES=index.item_queries,
        num_warps=tiles.num_warps, maxnreg=tiles.registers,
    )  # fmt: skip
    _shared_kernel[(triton.cdiv(num_queries, tiles.shared_rows // group), num_heads)](
        q, k, v, k_remote, v_remote, block_table, block_indices, position,
        part, scale, part_lse, lse,
        scale_log2, num_queries, head_start, num_local_pages, block_table.stride(0),
        *block_indices.stride(), *q.stride()[:2], lse.stride(0), *pages,
        **shape, DV=head_dim_v, SLOTS_P2=triton.next_power_of_2(num_slots), BLOCK_M=tiles.shared_rows,
        num_warps=tiles.shared_warps, maxnreg=tiles.shared_registers,
    )  # fmt: skip
    sum_parts(part, scale, out, head_start, rows=tiles.sum_rows, stages=tiles.sum_stages)
