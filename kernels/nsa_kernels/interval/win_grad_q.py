"""dQ of window attention in plain Triton, without atomics.

    P  = exp(softmax_scale * Q K^T - softmax_lse)                recomputed tile by tile
    dS = P * (dO V^T - delta)         dQ = gate * scale * dS K

A program owns the rows of a forward tile and walks their key tiles again. The scores are thus computed twice, here and
for dK and dV: 7 products in place of 5, the price of no atomics. Shapes: see `attention`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.rows import token_head_strides
from nsa_kernels.common.wild import tamed
from nsa_kernels.interval.statistics import load_statistics
from nsa_kernels.interval.tiles import num_tiles, rows_of_tile, window_dims, window_tiles


@launchable
@triton.jit
def _queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    begin_ptr,
    end_ptr,
    spans_ptr,
    statistics_ptr,
    grad_out_ptr,
    dq_ptr,
    stride_qt,
    stride_qh,
    stride_kr,
    stride_kh,
    stride_vr,
    stride_vh,
    stride_ot,
    stride_oh,
    num_queries,
    num_padded_rows,
    num_kv_heads,
    softmax_scale,
    G: tl.constexpr,
    DK: tl.constexpr,
    DK_TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
):
    """dQ of one tile of BLOCK_M (query, head) rows of one key-value head; the walk of the forward kernel."""
    first_row, stop_row = rows_of_tile(tl.program_id(0), spans_ptr, num_queries, G, BLOCK_M)
    head = tl.program_id(1)
    log2e: tl.constexpr = 1.4426950408889634
    scale_log2 = softmax_scale * log2e

    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < stop_row
    token = (row // G).to(tl.int64)
    q_head = head * G + row % G
    row_begin = tl.load(begin_ptr + token, mask=inside, other=0)  # [BLOCK_M]
    row_end = tl.load(end_ptr + token, mask=inside, other=0)
    first_token = first_row // G
    last_token = (tl.minimum(first_row + BLOCK_M, stop_row) - 1) // G
    low, low_last = tl.load(begin_ptr + first_token), tl.load(begin_ptr + last_token)
    high_first, high = tl.load(end_ptr + first_token), tl.load(end_ptr + last_token)

    dim_k, dim_v = tl.arange(0, DK), tl.arange(0, DV)
    out_row = token * (num_kv_heads * G) + q_head
    base, delta, gate = load_statistics(statistics_ptr, row, head, num_padded_rows, num_kv_heads)
    q_rows = q_ptr + token * stride_qt + q_head * stride_qh
    q = tl.load(q_rows[:, None] + dim_k[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, DK]
    grad_rows = grad_out_ptr + token * stride_ot + q_head * stride_oh
    grad_out = tl.load(grad_rows[:, None] + dim_v[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, DV]
    dq = tl.zeros([BLOCK_M, DK], tl.float32)
    if DK_TAIL > 0:
        dim_tail = DK + tl.arange(0, DK_TAIL)
        q_tail = tl.load(q_rows[:, None] + dim_tail[None, :], mask=inside[:, None], other=0.0)
        dq_tail = tl.zeros([BLOCK_M, DK_TAIL], tl.float32)
    k_head = k_ptr + head.to(tl.int64) * stride_kh
    v_head = v_ptr + head.to(tl.int64) * stride_vh

    for start in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        seen = (key >= low) & (key < high)
        k_rows = k_head + key.to(tl.int64) * stride_kr
        k = tl.load(k_rows[:, None] + dim_k[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, DK]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DK_TAIL > 0:
            k_tail = tl.load(k_rows[:, None] + dim_tail[None, :], mask=seen[:, None], other=0.0)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
        v_rows = v_head + key.to(tl.int64) * stride_vr
        v = tl.load(v_rows[:, None] + dim_v[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, DV]
        dp = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - base[:, None])
        ds = p * (dp - delta[:, None])
        if (start < low_last) | (start + BLOCK_N > high_first):
            visible = (key[None, :] >= row_begin[:, None]) & (key[None, :] < row_end[:, None])
            ds = tl.where(visible, ds, 0.0)
            if APART:
                k = tamed(k)
                if DK_TAIL > 0:
                    k_tail = tamed(k_tail)
        ds = ds.to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if DK_TAIL > 0:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)

    factor = gate * softmax_scale  # a row of P has one gate, which thus multiplies dQ
    dq_rows = dq_ptr + out_row * (DK + DK_TAIL)
    dq *= factor[:, None]
    tl.store(dq_rows[:, None] + dim_k[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside[:, None])
    if DK_TAIL > 0:
        dq_tail *= factor[:, None]
        tl.store(dq_rows[:, None] + dim_tail[None, :], dq_tail.to(dq_ptr.dtype.element_ty), mask=inside[:, None])


def grad_q(q, k, v, begin, end, statistics, grad_out, softmax_scale, apart, *, spans=None, into=None) -> Tensor:
    """dQ [T, Hq, Dk] in the dtype of q, `into` what is given. `apart`: see `wild`; `spans`: see `rows_of_tile`."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if into is None else into
    num_queries, num_kv_heads = q.shape[0], k.shape[1]
    tile = window_tiles(q.shape[2], q.element_size()).queries
    tiles = num_tiles(num_queries, spans, q.shape[1] // num_kv_heads, tile.block_m)
    _queries_kernel[(tiles, num_kv_heads)](
        *(q, k, v, begin, end, spans, statistics, grad_out),
        dq,
        *(*token_head_strides(q, k, v, grad_out), num_queries, statistics.shape[2], num_kv_heads, softmax_scale),
        **window_dims(q, k, v),
        APART=apart,
        **tile.launch(),
    )
    return dq
