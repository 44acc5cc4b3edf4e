"""Work items of the backward of selected attention: a block against some of the queries that chose it.

An item sums dK and dV of its block in registers and leaves one fp32 page of them; each (query, block) pair leaves its
part of dQ in the slot of the query. Shapes and the gate: see `backward`; `hopper.backward_items` does the same faster
where it can.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import split_head_dim
from nsa_kernels.selected.forward import LOG2E
from nsa_kernels.selected.index import BlockIndex
from nsa_kernels.selected.pages import load_page, page_strides
from nsa_kernels.selected.parts import SMALLEST
from nsa_kernels.selected.tiles import backward_tiles


@triton.jit
def _times_keys(ds, keys, PRECISION: tl.constexpr):
    """ds^T @ keys: [BLOCK_LEN, M], [BLOCK_LEN, D] -> [M, D]. A warp group's product has 64 rows: D if M is fewer."""
    if ds.shape[1] >= 64:
        result = tl.dot(tl.trans(ds), keys, input_precision=PRECISION)
    else:
        result = tl.trans(tl.dot(tl.trans(keys), ds, input_precision=PRECISION))
    return result


@launchable
@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_q_heads", "num_blocks", "head_start"])
def _items_kernel(
    q, k, v, k_remote, v_remote, grad_out, rows,
    block_table, entries, offsets, item_offsets, item_list,
    dq_part, dq_scale, dkv_part,
    softmax_scale, scale_log2, num_queries, num_heads, num_q_heads, num_lists, num_blocks, head_start, num_local_pages,
    stride_table, stride_qt, stride_qh, stride_ot, stride_oh, stride_plane,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    BLOCK_LEN: tl.constexpr, HAS_REMOTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, ITEM_QUERIES: tl.constexpr,
):  # fmt: skip
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
        about = rows + t * num_q_heads + q_head
        lse_row, delta_row, gate_row = tl.load(about), tl.load(about + stride_plane), tl.load(about + 2 * stride_plane)
        place = tl.load(about + 3 * stride_plane).to(tl.int32, bitcast=True)
        last_key = tl.where(live, place - block * BLOCK_LEN, -1)
        q_row = q + t * stride_qt + q_head * stride_qh
        q0 = tl.load(q_row[:, None] + tl.arange(0, DK0))  # [BLOCK_M, DK0]
        scores = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)  # [BLOCK_LEN, BLOCK_M]
        if DK1 > 0:
            q1 = tl.load(q_row[:, None] + DK0 + tl.arange(0, DK1))
            scores = tl.dot(k1, tl.trans(q1), scores, input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - lse_row[None, :])
        p = tl.where(key[:, None] <= last_key[None, :], p, 0.0) * gate_row[None, :]
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


def launch_items(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    grad_out: Tensor,
    rows: Tensor,
    block_table: Tensor,
    index: BlockIndex,
    dq_part: Tensor,
    dq_scale: Tensor,
    dkv_part: Tensor,
    *,
    head_start: int,
    softmax_scale: float,
) -> None:
    """Fill dq_part and dq_scale for the chunk's entries and dkv_part for its items."""
    num_heads, num_queries, num_slots, group, head_dim_k = dq_part.shape
    block_len, head_dim_v, num_blocks = dkv_part.shape[1], v.shape[2], block_table.shape[1]
    tiles = backward_tiles(group, head_dim_k, head_dim_v)
    dk0, dk1 = split_head_dim(head_dim_k)
    _items_kernel[(index.max_items,)](
        q, k, v, k_remote, v_remote, grad_out, rows,
        block_table, index.entries, index.offsets, index.item_offsets, index.item_list,
        dq_part, dq_scale, dkv_part,
        softmax_scale, softmax_scale * LOG2E, num_queries, num_heads, q.shape[1], index.num_lists, num_blocks,
        head_start, k.shape[0] // block_len, block_table.stride(0), *q.stride()[:2], *grad_out.stride()[:2],
        rows.stride(0), *page_strides(k, k_remote), *page_strides(v, v_remote),
        SLOTS=num_slots, GROUP=group, DK0=dk0, DK1=dk1, DV=head_dim_v, BLOCK_LEN=block_len,
        HAS_REMOTE=k_remote is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        BLOCK_M=tiles.rows, ITEM_QUERIES=index.item_queries,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.registers,
    )  # fmt: skip
