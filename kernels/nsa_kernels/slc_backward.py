"""Selected attention, backward: the forward's loop order, so that each block's keys and values are read once an item.

1. `row_deltas`: delta = sum(dO * O) - dlse per (query, head), unless the caller has it.
2. `items`, one work item at a time: a block against some of the queries that chose it. It sums its own dK and dV in
   registers and leaves one fp32 page of them; each (query, block) pair leaves its part of dQ in the slot of the query.
3. `slc_parts.sum_parts`: every query's dQ, its parts in the order of its list.
4. `pages`: adds up every block's items in order, and writes the page's gradient, wherever the page lies.

No atomics: two runs give the same bits.

Shapes      as `slc_forward`, and
    dq_part     [H, T, n, G, Dk]        fp16 for 16-bit inputs, fp32 for fp32, over its largest |element|
    dq_scale    [H, T, n, G]            fp32: what to multiply a part with
    dkv_part    [items, l', Dk + Dv]    fp32
Gate        dO may be of a sum of branches, out = .. + gate * out_slc: then P below is gate * softmax, and delta is that
            of out_slc without its gate. No gate is 1.
Numerics    P and dS enter their products in the dtype of q; sums are fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .slc_forward import LOG2E
from .slc_index import BlockIndex
from .slc_pages import load_page, page_strides, split_width
from .slc_parts import SMALLEST, sum_parts
from .slc_tiles import backward_tiles


@triton.jit
def _times_keys(ds, keys, PRECISION: tl.constexpr):
    """ds^T @ keys: [BLOCK_LEN, M], [BLOCK_LEN, D] -> [M, D]. A warp group's product has 64 rows: D if M is fewer."""
    if ds.shape[1] >= 64:
        result = tl.dot(tl.trans(ds), keys, input_precision=PRECISION)
    else:
        result = tl.trans(tl.dot(tl.trans(keys), ds, input_precision=PRECISION))
    return result


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_q_heads", "num_blocks", "head_start"])
def _items_kernel(
    q, k, v, k_remote, v_remote, grad_out, gate, lse, delta, position,
    block_table, entries, offsets, item_offsets, item_list,
    dq_part, dq_scale, dkv_part,
    softmax_scale, scale_log2, num_queries, num_heads, num_q_heads, num_lists, num_blocks, head_start, num_local_pages,
    stride_table, stride_qt, stride_qh, stride_ot, stride_oh, stride_gt, stride_gh,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    BLOCK_LEN: tl.constexpr, HAS_GATE: tl.constexpr, HAS_REMOTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, ITEM_QUERIES: tl.constexpr,
):  # fmt: skip
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
    dk0 = tl.zeros([BLOCK_LEN, DK0], tl.float32)
    if DK1 > 0:
        k1 = load_page(
            k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
            DK0, DK1, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
        dk1 = tl.zeros([BLOCK_LEN, DK1], tl.float32)
    value = load_page(
        v, v_remote, page, kv_head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
        0, DV, BLOCK_LEN, HAS_REMOTE,
    )  # fmt: skip
    dv = tl.zeros([BLOCK_LEN, DV], tl.float32)

    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row = tl.arange(0, BLOCK_M)
    g = row % GROUP
    key = tl.arange(0, BLOCK_LEN)
    for first in tl.range(begin, end, QUERIES):
        at = first + row // GROUP
        live = (at < end) & (row < QUERIES * GROUP)
        entry = tl.load(entries + tl.minimum(at, end - 1))  # past the end: the last query again, masked below
        t = (entry // SLOTS).to(tl.int64)
        q_head = kv_head * GROUP + g
        last_key = tl.where(live, tl.load(position + t).to(tl.int32) - block * BLOCK_LEN, -1)
        lse_row = tl.load(lse + t * num_q_heads + q_head) * 1.4426950408889634
        delta_row = tl.load(delta + t * num_q_heads + q_head)
        q_row = q + t * stride_qt + q_head * stride_qh
        q0 = tl.load(q_row[:, None] + tl.arange(0, DK0))  # [BLOCK_M, DK0]
        scores = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)  # [BLOCK_LEN, BLOCK_M]
        if DK1 > 0:
            q1 = tl.load(q_row[:, None] + DK0 + tl.arange(0, DK1))
            scores = tl.dot(k1, tl.trans(q1), scores, input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - lse_row[None, :])
        p = tl.where(key[:, None] <= last_key[None, :], p, 0.0)
        if HAS_GATE:
            p *= tl.load(gate + t * stride_gt + q_head * stride_gh).to(tl.float32)[None, :]
        do_row = grad_out + t * stride_ot + q_head * stride_oh
        do = tl.load(do_row[:, None] + tl.arange(0, DV))  # [BLOCK_M, DV]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)  # [BLOCK_LEN, BLOCK_M]
        ds = (p * (dp - delta_row[None, :])).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if DK1 > 0:
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        dq0 = _times_keys(ds, k0, PRECISION)
        if DK1 > 0:
            dq1 = _times_keys(ds, k1, PRECISION)
        part_row = (head.to(tl.int64) * num_queries * SLOTS + entry) * GROUP + g
        largest = tl.max(tl.abs(dq0), 1)
        if DK1 > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(dq1), 1))
        largest = tl.maximum(largest, SMALLEST)
        factor = 1 / largest
        tl.store(dq_scale + part_row, largest * softmax_scale, mask=live)
        part = dq_part + part_row[:, None] * (DK0 + DK1) + tl.arange(0, DK0)
        tl.store(part, (dq0 * factor[:, None]).to(dq_part.dtype.element_ty), mask=live[:, None])
        if DK1 > 0:
            part = dq_part + part_row[:, None] * (DK0 + DK1) + DK0 + tl.arange(0, DK1)
            tl.store(part, (dq1 * factor[:, None]).to(dq_part.dtype.element_ty), mask=live[:, None])

    WIDTH: tl.constexpr = DK0 + DK1 + DV
    page_row = dkv_part + (item.to(tl.int64) * BLOCK_LEN + key[:, None]) * WIDTH
    tl.store(page_row + tl.arange(0, DK0), dk0 * softmax_scale)
    if DK1 > 0:
        tl.store(page_row + DK0 + tl.arange(0, DK1), dk1 * softmax_scale)
    tl.store(page_row + DK0 + DK1 + tl.arange(0, DV), dv)


@triton.jit(do_not_specialize=["num_page_lists", "num_blocks", "head_start", "num_kv_heads", "num_local_pages"])
def _pages_kernel(
    dkv_part, item_offsets, block_table,
    dk, dv, dk_remote, dv_remote,
    num_lists, num_page_lists, num_blocks, head_start, num_kv_heads, num_local_pages, stride_table,
    DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr, BLOCK_LEN: tl.constexpr,
    HAS_REMOTE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one page's gradients: its items' pages in order, on top of earlier chunks' where ADD."""
    which = tl.program_id(0)
    kv_head, block = head_start + which // num_blocks, which % num_blocks
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    k0_column, v_column = tl.arange(0, DK0)[None, :], tl.arange(0, DV)[None, :]
    WIDTH: tl.constexpr = DK0 + DK1 + DV
    dk0_sum = tl.zeros([ROWS, DK0], tl.float32)
    if DK1 > 0:
        k1_column = DK0 + tl.arange(0, DK1)[None, :]
        dk1_sum = tl.zeros([ROWS, DK1], tl.float32)
    dv_sum = tl.zeros([ROWS, DV], tl.float32)
    num_items = 0
    for one_list in range(which, num_lists, num_page_lists):  # the page's list in every segment
        begin, end = tl.load(item_offsets + one_list), tl.load(item_offsets + one_list + 1)
        source = dkv_part + (begin.to(tl.int64) * BLOCK_LEN + row) * WIDTH
        for _ in tl.range(begin, end, num_stages=3):
            dk0_sum += tl.load(source + k0_column)
            if DK1 > 0:
                dk1_sum += tl.load(source + k1_column)
            dv_sum += tl.load(source + DK0 + DK1 + v_column)
            source += BLOCK_LEN * WIDTH
        num_items += end - begin
    if num_items == 0:
        return

    page = tl.load(block_table + kv_head * stride_table + block)
    if not HAS_REMOTE:  # every page is local: the branch below is never taken
        dk_remote, dv_remote = dk, dv
    if page >= num_local_pages:
        at = (page - num_local_pages).to(tl.int64) * BLOCK_LEN + row
        _put(dk_remote + at * (DK0 + DK1) + k0_column, dk0_sum, ADD)
        if DK1 > 0:
            _put(dk_remote + at * (DK0 + DK1) + k1_column, dk1_sum, ADD)
        _put(dv_remote + at * DV + v_column, dv_sum, ADD)
    else:
        at = (page.to(tl.int64) * BLOCK_LEN + row) * num_kv_heads + kv_head
        _put(dk + at * (DK0 + DK1) + k0_column, dk0_sum, ADD)
        if DK1 > 0:
            _put(dk + at * (DK0 + DK1) + k1_column, dk1_sum, ADD)
        _put(dv + at * DV + v_column, dv_sum, ADD)


@triton.jit
def _put(at, total, ADD: tl.constexpr):
    if ADD:
        total += tl.load(at).to(tl.float32)
    tl.store(at, total.to(at.dtype.element_ty))


def differentiate_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    block_table: Tensor,
    block_indices: Tensor,
    position: Tensor,
    index: BlockIndex,
    grad_out: Tensor,
    gate: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    page_grads: Sequence[Tensor | None],
    *,
    head_start: int,
    slc_block_len: int,
    softmax_scale: float,
    add: bool,
) -> None:
    """Fill dq for a chunk of queries and heads, and write, or add where `add`, their share of dk and dv.

    q, block_indices, position, grad_out, gate, lse, delta, dq are the chunk's rows with all heads; page_grads is dk, dv
    [R, Hkv, D] and dk_remote, dv_remote [pages, l', D], contiguous, zero where no chunk has written.
    """
    num_queries, num_slots = block_indices.shape[0], block_indices.shape[2]
    num_q_heads, head_dim_k, head_dim_v = q.shape[1], q.shape[2], v.shape[2]
    num_blocks, num_kv_heads = block_table.shape[1], k.shape[1]
    num_heads = index.num_lists // (index.num_segments * num_blocks)
    group = num_q_heads // num_kv_heads
    exact = q.dtype == torch.float32
    part_shape = (num_heads, num_queries, num_slots, group)
    part_dtype = torch.float32 if exact else torch.float16
    dq_part = torch.empty(*part_shape, head_dim_k, dtype=part_dtype, device=q.device)
    dq_scale = torch.zeros(part_shape, dtype=torch.float32, device=q.device)  # 0: no part
    dkv_part = torch.empty(
        index.max_items, slc_block_len, head_dim_k + head_dim_v, dtype=torch.float32, device=q.device
    )

    tiles = backward_tiles(group, head_dim_k, head_dim_v)
    dk0, dk1 = split_width(head_dim_k)
    num_local_pages = k.shape[0] // slc_block_len
    widths = {"DK0": dk0, "DK1": dk1, "DV": head_dim_v, "BLOCK_LEN": slc_block_len, "HAS_REMOTE": k_remote is not None}
    _items_kernel[(index.max_items,)](
        q, k, v, k_remote, v_remote, grad_out, gate, lse, delta, position,
        block_table, index.entries, index.offsets, index.item_offsets, index.item_list,
        dq_part, dq_scale, dkv_part,
        softmax_scale, softmax_scale * LOG2E, num_queries, num_heads, num_q_heads, index.num_lists, num_blocks,
        head_start, num_local_pages, block_table.stride(0), *q.stride()[:2], *grad_out.stride()[:2],
        *(gate.stride() if gate is not None else (0, 0)),
        *page_strides(k, k_remote), *page_strides(v, v_remote),
        SLOTS=num_slots, GROUP=group, **widths, HAS_GATE=gate is not None, PRECISION="ieee" if exact else "tf32",
        BLOCK_M=tiles.rows, ITEM_QUERIES=index.item_queries,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.registers,
    )  # fmt: skip
    sum_parts(dq_part, dq_scale, dq, head_start, rows=tiles.sum_rows, stages=tiles.sum_stages)
    rows = min(16, slc_block_len)
    num_page_lists = num_heads * num_blocks
    _pages_kernel[(num_page_lists, slc_block_len // rows)](
        dkv_part, index.item_offsets, block_table,
        *page_grads,
        index.num_lists, num_page_lists, num_blocks, head_start, num_kv_heads, num_local_pages,
        block_table.stride(0),
        **widths, ADD=add, ROWS=rows,
    )  # fmt: skip
