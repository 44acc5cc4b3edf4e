"""Selected attention, backward: the forward's loop order, so that each block's keys and values are read once an item.

1. `rows`: delta = sum(dO * O) - dlse and the norm of dO, per (query, head).
2. `items`, one work item at a time: a block against some of the queries that chose it. It sums its own dK and dV in
   registers and leaves one fp32 page of them; each (query, block) pair leaves its part of dQ in the query's own slot.
3. `dq`: adds every query's parts in the order of its list.
4. `pages`: adds every block's items in order, and writes the page's gradient, wherever the page lies.

No atomics: two runs give the same bits.

Shapes      as `slc_forward`, and
    dq_part     [H, T, n, G, Dk]    fp16: dq / bound, for 16-bit inputs; fp32: dq, for fp32 inputs
    dkv_part    [items, l', Dk + Dv]    fp32
    bounds      [H, num_blocks, 2]  fp32: largest |key element| and largest norm of a value row
Numerics    |dq| <= softmax_scale * (|dO| * max |v_j| + |delta|) * max |k_ij|, because a block's probabilities add up to
            at most 1. Parts are divided by that bound over 2**15, so fp16's whole range of exponents is used: its
            11 bits are finer than the bf16 of the operands, and nothing overflows. Sums are fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .slc_forward import LOG2E
from .slc_index import BlockIndex, is_gathered
from .slc_pages import load_page, page_strides, split_width
from .slc_tiles import backward_tiles

DQ_RANGE = tl.constexpr(1 / 32768)


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def _rows_kernel(
    out, grad_out, grad_lse,
    delta, norm,
    num_rows, num_heads, stride_ot, stride_oh, stride_gt, stride_gh, stride_lt, stride_lh,
    DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < num_rows
    t, h = row // num_heads, row % num_heads
    column = tl.arange(0, DV)[None, :]
    o = tl.load(out + (t * stride_ot + h * stride_oh)[:, None] + column, mask=live[:, None], other=0.0).to(tl.float32)
    g = tl.load(grad_out + (t * stride_gt + h * stride_gh)[:, None] + column, mask=live[:, None], other=0.0)
    g = g.to(tl.float32)
    result = tl.sum(o * g, 1)
    if HAS_GRAD_LSE:
        result -= tl.load(grad_lse + t * stride_lt + h * stride_lh, mask=live, other=0.0)
    tl.store(delta + row, result, mask=live)
    tl.store(norm + row, tl.sqrt(tl.sum(g * g, 1)), mask=live)


@triton.jit
def _dq_bound(norm, delta, key_peak, value_norm, softmax_scale):
    """What a stored part of dq is to be multiplied by."""
    bound = softmax_scale * (norm * value_norm + tl.abs(delta)) * key_peak * DQ_RANGE
    return tl.where(bound > 0, bound, 1.0)


@triton.jit(do_not_specialize=["num_queries", "num_q_heads", "num_lists", "num_blocks", "head_start", "num_local_pages"])
def _items_kernel(
    q, k, v, k_remote, v_remote, grad_out, lse, delta, norm, position,
    block_table, entries, offsets, item_offsets, item_list,
    dq_part, dkv_part, bounds,
    softmax_scale, scale_log2, num_queries, num_q_heads, num_lists, num_blocks, head_start, num_local_pages,
    stride_table, stride_qt, stride_qh, stride_gt, stride_gh,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    BLOCK_LEN: tl.constexpr, HAS_REMOTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, ITEM_QUERIES: tl.constexpr,
):  # fmt: skip
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
    key_peak = tl.max(tl.abs(k0.to(tl.float32)))
    dk0 = tl.zeros([BLOCK_LEN, DK0], tl.float32)
    if DK1 > 0:
        k1 = load_page(
            k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
            DK0, DK1, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
        key_peak = tl.maximum(key_peak, tl.max(tl.abs(k1.to(tl.float32))))
        dk1 = tl.zeros([BLOCK_LEN, DK1], tl.float32)
    value = load_page(
        v, v_remote, page, kv_head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
        0, DV, BLOCK_LEN, HAS_REMOTE,
    )  # fmt: skip
    v32 = value.to(tl.float32)
    value_norm = tl.sqrt(tl.max(tl.sum(v32 * v32, 1)))
    dv = tl.zeros([BLOCK_LEN, DV], tl.float32)
    # All items of a list write the same numbers.
    tl.store(bounds + which * 2, key_peak)
    tl.store(bounds + which * 2 + 1, value_norm)

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
        do_row = grad_out + t * stride_gt + q_head * stride_gh
        do = tl.load(do_row[:, None] + tl.arange(0, DV))  # [BLOCK_M, DV]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)  # [BLOCK_LEN, BLOCK_M]
        ds = (p * (dp - delta_row[None, :])).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if DK1 > 0:
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if dq_part.dtype.element_ty == tl.float16:
            norm_row = tl.load(norm + t * num_q_heads + q_head)
            factor = softmax_scale / _dq_bound(norm_row, delta_row, key_peak, value_norm, softmax_scale)
        else:
            factor = tl.full([BLOCK_M], softmax_scale, tl.float32)
        part_row = (head.to(tl.int64) * num_queries * SLOTS + entry) * GROUP + g
        part = dq_part + part_row[:, None] * (DK0 + DK1) + tl.arange(0, DK0)
        ds_t = tl.trans(ds)  # [BLOCK_M, BLOCK_LEN]
        dq0 = tl.dot(ds_t, k0, input_precision=PRECISION) * factor[:, None]
        tl.store(part, dq0.to(dq_part.dtype.element_ty), mask=live[:, None])
        if DK1 > 0:
            dq1 = tl.dot(ds_t, k1, input_precision=PRECISION) * factor[:, None]
            part = dq_part + part_row[:, None] * (DK0 + DK1) + DK0 + tl.arange(0, DK1)
            tl.store(part, dq1.to(dq_part.dtype.element_ty), mask=live[:, None])

    WIDTH: tl.constexpr = DK0 + DK1 + DV
    page_row = dkv_part + (item.to(tl.int64) * BLOCK_LEN + key[:, None]) * WIDTH
    tl.store(page_row + tl.arange(0, DK0), dk0 * softmax_scale)
    if DK1 > 0:
        tl.store(page_row + DK0 + tl.arange(0, DK1), dk1 * softmax_scale)
    tl.store(page_row + DK0 + DK1 + tl.arange(0, DV), dv)


@triton.jit(do_not_specialize=["num_queries", "num_q_heads", "num_blocks", "head_start"])
def _dq_kernel(
    dq_part, bounds, delta, norm, block_indices, position,
    dq,
    softmax_scale, num_queries, num_q_heads, num_blocks, head_start,
    stride_bt, stride_bh, stride_bn, stride_qt, stride_qh,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_LEN: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of a tile of consecutive queries, WIDTH columns of it: the parts of each row, in the order of its list."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row = tl.arange(0, BLOCK_M)
    t = tl.program_id(0) * QUERIES + row // GROUP
    head = tl.program_id(1)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)[None, :]
    kv_head = head_start + head
    live = (t < num_queries) & (row < QUERIES * GROUP)
    t = tl.where(live, t, 0).to(tl.int64)
    q_head = kv_head * GROUP + row % GROUP
    pos = tl.load(position + t, mask=live, other=-1).to(tl.int32)
    own = tl.where(pos >= 0, pos // BLOCK_LEN, -1)
    delta_row = tl.load(delta + t * num_q_heads + q_head)
    norm_row = tl.load(norm + t * num_q_heads + q_head)
    part_row = (head.to(tl.int64) * num_queries + t) * SLOTS * GROUP + row % GROUP
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for i in tl.range(0, SLOTS, num_stages=STAGES):
        block = tl.load(block_indices + t * stride_bt + kv_head * stride_bh + i * stride_bn, mask=live, other=-1)
        has_part = live & is_gathered(block, i, own, True)
        x = tl.load(dq_part + (part_row + i * GROUP)[:, None] * DK + column, mask=has_part[:, None], other=0.0)
        x = x.to(tl.float32)
        if dq_part.dtype.element_ty == tl.float16:
            at = bounds + (head * num_blocks + block) * 2
            key_peak = tl.load(at, mask=has_part, other=0.0)
            value_norm = tl.load(at + 1, mask=has_part, other=0.0)
            x *= _dq_bound(norm_row, delta_row, key_peak, value_norm, softmax_scale)[:, None]
        acc += x
    at = dq + (t * stride_qt + q_head * stride_qh)[:, None] + column
    tl.store(at, acc.to(dq.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["num_blocks", "head_start", "num_heads", "num_local_pages"])
def _pages_kernel(
    dkv_part, item_offsets, block_table,
    dk, dv, dk_remote, dv_remote,
    num_blocks, head_start, num_heads, num_local_pages, stride_table,
    DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr, BLOCK_LEN: tl.constexpr,
    HAS_REMOTE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one block's gradients: its items' pages in order, on top of earlier chunks' where ADD."""
    which = tl.program_id(0)
    begin, end = tl.load(item_offsets + which), tl.load(item_offsets + which + 1)
    if begin == end:
        return
    kv_head, block = head_start + which // num_blocks, which % num_blocks
    page = tl.load(block_table + kv_head * stride_table + block)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    local_row = (page.to(tl.int64) * BLOCK_LEN + row) * num_heads + kv_head
    remote_row = (page - num_local_pages).to(tl.int64) * BLOCK_LEN + row
    _add_columns(
        dkv_part, dk, dk_remote, begin, end, row, local_row, remote_row, page >= num_local_pages,
        0, 0, DK0, DK0 + DK1, DK0 + DK1 + DV, BLOCK_LEN, HAS_REMOTE, ADD, ROWS,
    )  # fmt: skip
    if DK1 > 0:
        _add_columns(
            dkv_part, dk, dk_remote, begin, end, row, local_row, remote_row, page >= num_local_pages,
            DK0, DK0, DK1, DK0 + DK1, DK0 + DK1 + DV, BLOCK_LEN, HAS_REMOTE, ADD, ROWS,
        )  # fmt: skip
    _add_columns(
        dkv_part, dv, dv_remote, begin, end, row, local_row, remote_row, page >= num_local_pages,
        DK0 + DK1, 0, DV, DV, DK0 + DK1 + DV, BLOCK_LEN, HAS_REMOTE, ADD, ROWS,
    )  # fmt: skip


@triton.jit
def _add_columns(
    dkv_part, local, remote, begin, end, row, local_row, remote_row, is_remote,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, WIDTH: tl.constexpr, TARGET_WIDTH: tl.constexpr,
    PART_WIDTH: tl.constexpr, BLOCK_LEN: tl.constexpr, HAS_REMOTE: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Sum columns SOURCE .. SOURCE + WIDTH over the items and put them at TARGET of the page's rows."""
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    source = dkv_part + (begin.to(tl.int64) * BLOCK_LEN + row)[:, None] * PART_WIDTH + SOURCE + column
    for _ in tl.range(begin, end, num_stages=3):
        total += tl.load(source)
        source += BLOCK_LEN * PART_WIDTH
    if HAS_REMOTE:
        if is_remote:
            _put(remote + remote_row[:, None] * TARGET_WIDTH + TARGET + column, total, ADD)
        else:
            _put(local + local_row[:, None] * TARGET_WIDTH + TARGET + column, total, ADD)
    else:
        _put(local + local_row[:, None] * TARGET_WIDTH + TARGET + column, total, ADD)


@triton.jit
def _put(at, total, ADD: tl.constexpr):
    if ADD:
        total += tl.load(at).to(tl.float32)
    tl.store(at, total.to(at.dtype.element_ty))


def row_terms(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """delta = sum(dO * O) - dlse and the norm of dO, both fp32 [T, Hq]. grad_out needs unit stride in its last dim."""
    num_queries, num_heads, head_dim = out.shape
    delta, norm = (torch.empty(num_queries, num_heads, dtype=torch.float32, device=out.device) for _ in range(2))
    rows = num_queries * num_heads
    lse_strides = grad_lse.stride() if grad_lse is not None else (0, 0)
    _rows_kernel[(triton.cdiv(rows, 64),)](
        out, grad_out, grad_lse,
        delta, norm,
        rows, num_heads, *out.stride()[:2], *grad_out.stride()[:2], *lse_strides,
        DV=head_dim, HAS_GRAD_LSE=grad_lse is not None, BLOCK_M=64,
    )  # fmt: skip
    return delta, norm


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
    lse: Tensor,
    delta: Tensor,
    norm: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dk_remote: Tensor | None,
    dv_remote: Tensor | None,
    *,
    head_start: int,
    slc_block_len: int,
    softmax_scale: float,
    add: bool,
) -> None:
    """Fill dq for a chunk of queries and heads, and write, or add where `add`, their share of dk and dv.

    q, block_indices, position, grad_out, lse, delta, norm, dq are the chunk's rows with all heads; dk, dv
    [R, Hkv, D] and dk_remote, dv_remote [pages, l', D] are contiguous, and zero where no chunk has written.
    """
    num_queries, num_slots = block_indices.shape[0], block_indices.shape[2]
    num_q_heads, head_dim_k, head_dim_v = q.shape[1], q.shape[2], v.shape[2]
    num_blocks, num_kv_heads = block_table.shape[1], k.shape[1]
    num_heads = index.num_lists // num_blocks
    group = num_q_heads // num_kv_heads
    exact = q.dtype == torch.float32
    part_dtype = torch.float32 if exact else torch.float16
    dq_part = torch.empty(
        num_heads, num_queries, num_slots, group, head_dim_k, dtype=part_dtype, device=q.device
    )
    fp32 = {"dtype": torch.float32, "device": q.device}
    dkv_part = torch.empty(index.max_items, slc_block_len, head_dim_k + head_dim_v, **fp32)
    bounds = torch.empty(num_heads, num_blocks, 2, **fp32)

    tiles = backward_tiles(group, head_dim_k, head_dim_v)
    dk0, dk1 = split_width(head_dim_k)
    num_local_pages = k.shape[0] // slc_block_len
    widths = {"DK0": dk0, "DK1": dk1, "DV": head_dim_v, "BLOCK_LEN": slc_block_len, "HAS_REMOTE": k_remote is not None}
    _items_kernel[(index.max_items,)](
        q, k, v, k_remote, v_remote, grad_out, lse, delta, norm, position,
        block_table, index.entries, index.offsets, index.item_offsets, index.item_list,
        dq_part, dkv_part, bounds,
        softmax_scale, softmax_scale * LOG2E, num_queries, num_q_heads, index.num_lists, num_blocks, head_start,
        num_local_pages, block_table.stride(0), *q.stride()[:2], *grad_out.stride()[:2],
        *page_strides(k, k_remote), *page_strides(v, v_remote),
        SLOTS=num_slots, GROUP=group, **widths, PRECISION="ieee" if exact else "tf32",
        BLOCK_M=tiles.rows, ITEM_QUERIES=index.item_queries,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    width = dk1 or dk0
    grid = (triton.cdiv(num_queries, tiles.sum_rows // group), num_heads, head_dim_k // width)
    _dq_kernel[grid](
        dq_part, bounds, delta, norm, block_indices, position,
        dq,
        softmax_scale, num_queries, num_q_heads, num_blocks, head_start,
        *block_indices.stride(), *dq.stride()[:2],
        SLOTS=num_slots, GROUP=group, DK=head_dim_k, WIDTH=width,
        BLOCK_LEN=slc_block_len, BLOCK_M=tiles.sum_rows, STAGES=3,
    )  # fmt: skip
    rows = min(16, slc_block_len)
    _pages_kernel[(index.num_lists, slc_block_len // rows)](
        dkv_part, index.item_offsets, block_table,
        dk, dv, dk_remote, dv_remote,
        num_blocks, head_start, num_kv_heads, num_local_pages, block_table.stride(0),
        **widths, ADD=add, ROWS=rows,
    )  # fmt: skip
