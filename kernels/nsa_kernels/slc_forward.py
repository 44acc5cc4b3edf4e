"""Selected attention, forward: blocks wait for the queries that chose them, then every query gathers its parts.

1. `partials`, one work item of the index at a time. A block's keys and values are loaded once and meet all queries
   that chose it, the G heads of each as G tile rows, so tiles are full at any G. Each (query, block) pair leaves its own
   normalised output and log-sum-exp in the query's own slot: nothing is accumulated across queries or programs.
2. `finish`, one tile of consecutive queries at a time. Each row's first block, its own and the one before are
   attended to in place, since neighbours share them; then the row's parts are added in the order of its list.

So a query's bits depend on its own list of blocks only: not on its tile neighbours, not on page numbers.

Shapes      T = query tokens of this chunk, n = slots, G = query heads per key-value head, H = key-value heads of it
    part        [H, T, n, G, Dv]    fp16: out / peak, |.| <= 1, for 16-bit inputs; fp32: out, for fp32 inputs
    part_lse    [H, T, n, G]        fp32, log2 of the sum of exponentials
    peak        [H, num_blocks]     fp32, largest |value| of a block; written where the block has been attended to
Numerics    scores, softmax statistics and sums in fp32; the probabilities meet the values in the dtype of q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .slc_index import BlockIndex, is_gathered
from .slc_pages import load_page, page_strides, split_width
from .slc_tiles import forward_tiles

# Sizes that differ from chunk to chunk: one compiled kernel must serve all.
_SIZES = ["num_queries", "num_lists", "num_blocks", "head_start", "num_local_pages"]
NO_BLOCK = tl.constexpr(2**30)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=_SIZES)
def _partials_kernel(
    q, k, v, k_remote, v_remote, block_table, entries, offsets, item_offsets, item_list,
    part, part_lse, peak,
    scale_log2, num_queries, num_lists, num_blocks, head_start, num_local_pages, stride_table,
    stride_qt, stride_qh,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    BLOCK_LEN: tl.constexpr, HAS_REMOTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, ITEM_QUERIES: tl.constexpr,
):  # fmt: skip
    """One work item: a block against some of the queries that chose it."""
    item = tl.program_id(0)
    which = tl.load(item_list + item)
    if which >= num_lists:
        return
    head, block = which // num_blocks, which % num_blocks
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
    value = load_page(
        v, v_remote, page, kv_head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
        0, DV, BLOCK_LEN, HAS_REMOTE,
    )  # fmt: skip
    largest = tl.max(tl.abs(value.to(tl.float32)))
    if part.dtype.element_ty == tl.float16:
        shrink = 1 / tl.where(largest > 0, largest, 1.0)
    else:
        shrink = 1.0
    # All items of a list write the same number.
    tl.store(peak + which, largest)

    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row = tl.arange(0, BLOCK_M)
    g = row % GROUP
    for first in tl.range(begin, end, QUERIES):
        at = first + row // GROUP
        live = (at < end) & (row < QUERIES * GROUP)
        entry = tl.load(entries + tl.minimum(at, end - 1))  # past the end: the last query again, not stored
        q_row = q + (entry // SLOTS).to(tl.int64) * stride_qt + (kv_head * GROUP + g) * stride_qh
        q0 = tl.load(q_row[:, None] + tl.arange(0, DK0))  # [BLOCK_M, DK0]
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BLOCK_M, BLOCK_LEN]
        if DK1 > 0:
            q1 = tl.load(q_row[:, None] + DK0 + tl.arange(0, DK1))
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        top = tl.max(scores, 1) * scale_log2
        p = tl.exp2(scores * scale_log2 - top[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(value.dtype), value, input_precision=PRECISION)  # [BLOCK_M, DV]
        out = out * (shrink / total)[:, None]
        part_row = (head.to(tl.int64) * num_queries * SLOTS + entry) * GROUP + g
        tl.store(part + part_row[:, None] * DV + tl.arange(0, DV), out.to(part.dtype.element_ty), mask=live[:, None])
        tl.store(part_lse + part_row, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=[x for x in _SIZES if x != "num_lists"])
def _finish_kernel(
    q, k, v, k_remote, v_remote, block_table, block_indices, position, part, part_lse, peak,
    out, lse,
    scale_log2, num_queries, num_blocks, head_start, num_local_pages, stride_table,
    stride_bt, stride_bh, stride_bn, stride_qt, stride_qh,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    stride_ot, stride_oh, stride_lt,
    SLOTS: tl.constexpr, SLOTS_P2: tl.constexpr, GROUP: tl.constexpr,
    DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    BLOCK_LEN: tl.constexpr, HAS_REMOTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, GATHER_STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of consecutive queries: the blocks that neighbours share, then each row's own parts."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row = tl.arange(0, BLOCK_M)
    t = tl.program_id(0) * QUERIES + row // GROUP
    head = tl.program_id(1)
    kv_head = head_start + head
    live = (t < num_queries) & (row < QUERIES * GROUP)
    t = tl.where(live, t, 0).to(tl.int64)
    q_head = kv_head * GROUP + row % GROUP

    # --- which blocks: ids [BLOCK_M, SLOTS_P2]
    pos = tl.load(position + t, mask=live, other=-1).to(tl.int32)
    own = tl.where(pos >= 0, pos // BLOCK_LEN, -1)
    slot = tl.arange(0, SLOTS_P2)[None, :]
    ids_row = block_indices + t * stride_bt + kv_head * stride_bh
    there = live[:, None] & (slot < SLOTS)
    ids = tl.load(ids_row[:, None] + slot * stride_bn, mask=there, other=-1)
    in_place = (ids >= 0) & (ids <= own[:, None]) & ~is_gathered(ids, slot, own[:, None], False)
    waiting = tl.where(in_place, ids, NO_BLOCK)

    # --- blocks attended to in place, ascending; a block that a row did not choose changes nothing in it
    q_row = q + t * stride_qt + q_head * stride_qh
    q0 = tl.load(q_row[:, None] + tl.arange(0, DK0))
    if DK1 > 0:
        q1 = tl.load(q_row[:, None] + DK0 + tl.arange(0, DK1))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    block = tl.min(tl.min(waiting, 1))
    while block < NO_BLOCK:
        page = tl.load(block_table + kv_head * stride_table + block)
        k0 = load_page(
            k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
            0, DK0, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if DK1 > 0:
            k1 = load_page(
                k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
                DK0, DK1, BLOCK_LEN, HAS_REMOTE,
            )  # fmt: skip
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        value = load_page(
            v, v_remote, page, kv_head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
            0, DV, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
        # The last key that each row sees here; -1 where the row did not choose the block.
        chosen = tl.max((waiting == block).to(tl.int32), 1) > 0
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
        waiting = tl.where(waiting == block, NO_BLOCK, waiting)
        block = tl.min(tl.min(waiting, 1))

    # --- the row's parts, in the order of its list
    gathered = there & is_gathered(ids, slot, own[:, None], False)
    part_row = ((head.to(tl.int64) * num_queries + t) * SLOTS) * GROUP + row % GROUP
    lse_parts = tl.load(part_lse + part_row[:, None] + slot * GROUP, mask=gathered, other=float("-inf"))
    new_top = tl.maximum(top, tl.max(lse_parts, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep = tl.exp2(top - base)
    total = total * keep + tl.sum(tl.exp2(lse_parts - base[:, None]), 1)
    acc = acc * keep[:, None]
    for i in tl.range(1, SLOTS, num_stages=GATHER_STAGES):
        block_i = tl.load(ids_row + i * stride_bn, mask=live, other=-1)
        has_part = live & is_gathered(block_i, i, own, False)
        row_i = part_row + i * GROUP
        weight = tl.exp2(tl.load(part_lse + row_i, mask=has_part, other=float("-inf")) - base)
        if part.dtype.element_ty == tl.float16:
            weight *= tl.load(peak + head * num_blocks + block_i, mask=has_part, other=0.0)
        x = tl.load(part + row_i[:, None] * DV + tl.arange(0, DV), mask=has_part[:, None], other=0.0)
        acc += weight[:, None] * x.to(tl.float32)

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    out_row = out + t * stride_ot + q_head * stride_oh
    tl.store(out_row[:, None] + tl.arange(0, DV), acc.to(out.dtype.element_ty), mask=live[:, None])
    result = tl.where(empty, float("-inf"), (base + tl.log2(total)) * LN2)
    tl.store(lse + t * stride_lt + q_head, result, mask=live)


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
    num_heads = index.num_lists // num_blocks
    group, head_dim_v = q.shape[1] // num_kv_heads, v.shape[2]
    exact = q.dtype == torch.float32
    part_shape = (num_heads, num_queries, num_slots, group)
    part = torch.empty(*part_shape, head_dim_v, dtype=torch.float32 if exact else torch.float16, device=q.device)
    part_lse = torch.empty(part_shape, dtype=torch.float32, device=q.device)
    peak = torch.empty(num_heads, num_blocks, dtype=torch.float32, device=q.device)

    tiles = forward_tiles(group, q.shape[2], head_dim_v)
    dk0, dk1 = split_width(q.shape[2])
    pages = (*page_strides(k, k_remote), *page_strides(v, v_remote))
    num_local_pages = k.shape[0] // slc_block_len
    shape = {
        "SLOTS": num_slots,
        "GROUP": group,
        "DK0": dk0,
        "DK1": dk1,
        "DV": head_dim_v,
        "BLOCK_LEN": slc_block_len,
        "HAS_REMOTE": k_remote is not None,
        "PRECISION": "ieee" if exact else "tf32",
    }
    scale_log2 = softmax_scale * LOG2E
    _partials_kernel[(index.max_items,)](
        q, k, v, k_remote, v_remote, block_table, index.entries, index.offsets, index.item_offsets, index.item_list,
        part, part_lse, peak,
        scale_log2, num_queries, index.num_lists, num_blocks, head_start, num_local_pages, block_table.stride(0),
        *q.stride()[:2], *pages,
        **shape, BLOCK_M=tiles.rows, ITEM_QUERIES=index.item_queries,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    finish_rows = tiles.finish_rows
    grid = (triton.cdiv(num_queries, finish_rows // group), num_heads)
    _finish_kernel[grid](
        q, k, v, k_remote, v_remote, block_table, block_indices, position, part, part_lse, peak,
        out, lse,
        scale_log2, num_queries, num_blocks, head_start, num_local_pages, block_table.stride(0),
        *block_indices.stride(), *q.stride()[:2], *pages, *out.stride()[:2], lse.stride(0),
        **shape, SLOTS_P2=triton.next_power_of_2(num_slots), BLOCK_M=finish_rows, GATHER_STAGES=tiles.finish_stages,
        num_warps=tiles.finish_warps,
    )  # fmt: skip
