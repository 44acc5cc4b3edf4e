"""Parts of the forward of selected attention: a block against the queries that chose it, one work item at a time.

A block's keys and values are loaded once and meet the queries, the G heads of each as G tile rows, so tiles are full at
any G. Each (query, block) pair leaves its own normalised output and log-sum-exp in the slot of the query. Shapes: see
`forward`; `hopper.forward_gathered` does the same faster where it can.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import split_head_dim
from nsa_kernels.selected.index import BlockIndex
from nsa_kernels.selected.pages import load_page, page_strides
from nsa_kernels.selected.parts import SMALLEST
from nsa_kernels.selected.tiles import forward_tiles


@launchable
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
    if item >= tl.load(item_offsets + num_lists):
        return
    which = tl.load(item_list + item)
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


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    block_table: Tensor,
    index: BlockIndex,
    part: Tensor,
    scale: Tensor,
    part_lse: Tensor,
    *,
    head_start: int,
    slc_block_len: int,
    scale_log2: float,
) -> None:
    """Fill part, scale and part_lse for the chunk's entries."""
    num_heads, num_queries, num_slots, group, head_dim_v = part.shape
    tiles = forward_tiles(group, q.shape[2], head_dim_v)
    dk0, dk1 = split_head_dim(q.shape[2])
    # Half the columns at a time take half the shared memory on their way out: three programs per SM instead of two.
    dv0, dv1 = (head_dim_v // 2, head_dim_v // 2) if head_dim_v >= 128 else (head_dim_v, 0)
    _gathered_kernel[(index.max_items,)](
        q, k, v, k_remote, v_remote, block_table, index.entries, index.offsets, index.item_offsets, index.item_list,
        part, scale, part_lse,
        scale_log2, num_queries, num_heads, index.num_lists, block_table.shape[1], head_start,
        k.shape[0] // slc_block_len, block_table.stride(0), *q.stride()[:2],
        *page_strides(k, k_remote), *page_strides(v, v_remote),
        SLOTS=num_slots, GROUP=group, DK0=dk0, DK1=dk1, DV0=dv0, DV1=dv1, BLOCK_LEN=slc_block_len,
        HAS_REMOTE=k_remote is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        BLOCK_M=tiles.rows, ITEM_QUERIES=index.item_queries,
        num_warps=tiles.num_warps, maxnreg=tiles.registers,
    )  # fmt: skip
