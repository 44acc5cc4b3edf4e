"""Gradients of gated window attention in two kernels without atomics: dK and dV, then dQ.

    P  = gate * exp(softmax_scale * Q K^T - softmax_lse)         recomputed tile by tile
    dV = P^T dO         dP = dO V^T         dS = P * (dP - delta)         dQ = scale * dS K         dK = scale * dS^T Q
    delta[t, h] = sum_d dO[t, h, d] * out[t, h, d]               of `out` without its gate

`softmax_lse` shifts every score of a row alike, so a gradient of its own joins dS as `+ P * grad_lse`: it is taken off
delta.

dK, dV      A program owns 64 key rows of one key-value head and walks the (query, head) rows that see any of them, so
            the sum over queries and over the G heads stays in fp32 registers and is rounded once.
dQ          A program owns the rows of a forward tile and walks their key tiles again. The scores are thus computed
            twice: 7 products in place of 5, the price of no atomics.
Shapes      as win_attention.py; grad_out [T, Hq, Dv], gate [T, Hq] or None for ones, delta, softmax_lse [T, Hq] fp32,
            all of any strides
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.rows import token_head_strides, unit_stride
from nsa_kernels.win_tiles import KEY_TILE, kernel_dims, window_tiles


@triton.jit
def _keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    begin_ptr,
    end_ptr,
    gate_ptr,
    lse_ptr,
    delta_ptr,
    grad_out_ptr,
    bounds_ptr,
    dk_ptr,
    dv_ptr,
    stride_qt,
    stride_qh,
    stride_kr,
    stride_kh,
    stride_vr,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_gt,
    stride_gh,
    stride_lt,
    stride_lh,
    stride_dt,
    stride_dh,
    num_keys,
    num_kv_heads,
    softmax_scale,
    G: tl.constexpr,
    DK: tl.constexpr,
    DK_TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """dK and dV of BLOCK_N key rows. Scores are transposed, [keys, rows]: P^T and dS^T then feed from registers."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    log2e: tl.constexpr = 1.4426950408889634
    scale_log2 = softmax_scale * log2e

    # A row that sees nothing has lse = -inf and P = exp(inf), but it is in no full tile, and the mask gives it 0.
    bounds = bounds_ptr + tile * 4
    first_row, last_row = tl.load(bounds) * G, tl.load(bounds + 3) * G
    first_full, last_full = tl.load(bounds + 1) * G, tl.load(bounds + 2) * G

    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    present = key < num_keys
    dim_k, dim_v = tl.arange(0, DK), tl.arange(0, DV)
    k_rows = k_ptr + key.to(tl.int64) * stride_kr + head.to(tl.int64) * stride_kh
    v_rows = v_ptr + key.to(tl.int64) * stride_vr + head.to(tl.int64) * stride_vh
    k = tl.load(k_rows[:, None] + dim_k[None, :], mask=present[:, None], other=0.0)  # [BLOCK_N, DK]
    v = tl.load(v_rows[:, None] + dim_v[None, :], mask=present[:, None], other=0.0)  # [BLOCK_N, DV]
    dk = tl.zeros([BLOCK_N, DK], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    if DK_TAIL > 0:
        dim_tail = DK + tl.arange(0, DK_TAIL)
        k_tail = tl.load(k_rows[:, None] + dim_tail[None, :], mask=present[:, None], other=0.0)
        dk_tail = tl.zeros([BLOCK_N, DK_TAIL], tl.float32)

    for start in range(first_row, last_row, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < last_row
        token = (row // G).to(tl.int64)
        q_head = head * G + row % G
        q_rows = q_ptr + token * stride_qt + q_head * stride_qh
        q = tl.load(q_rows[:, None] + dim_k[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, DK]
        lse = tl.load(lse_ptr + token * stride_lt + q_head * stride_lh, mask=inside, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if DK_TAIL > 0:
            q_tail = tl.load(q_rows[:, None] + dim_tail[None, :], mask=inside[:, None], other=0.0)
            s = tl.dot(k_tail, tl.trans(q_tail), s, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - (lse * log2e)[None, :])
        if (start < first_full) | (start + BLOCK_M > last_full):
            row_begin = tl.load(begin_ptr + token, mask=inside, other=0)
            row_end = tl.load(end_ptr + token, mask=inside, other=0)
            visible = (key[:, None] >= row_begin[None, :]) & (key[:, None] < row_end[None, :])
            p = tl.where(visible, p, 0.0)
        if HAS_GATE:
            gate = tl.load(gate_ptr + token * stride_gt + q_head * stride_gh, mask=inside, other=0.0)
            p *= gate.to(tl.float32)[None, :]
        grad_rows = grad_out_ptr + token * stride_ot + q_head * stride_oh
        grad_out = tl.load(grad_rows[:, None] + dim_v[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, DV]
        dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        delta = tl.load(delta_ptr + token * stride_dt + q_head * stride_dh, mask=inside, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if DK_TAIL > 0:
            dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)

    out_row = key.to(tl.int64) * num_kv_heads + head
    dv_ptrs = dv_ptr + out_row[:, None] * DV + dim_v[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=present[:, None])
    dk_rows = dk_ptr + out_row * (DK + DK_TAIL)
    dk *= softmax_scale
    tl.store(dk_rows[:, None] + dim_k[None, :], dk.to(dk_ptr.dtype.element_ty), mask=present[:, None])
    if DK_TAIL > 0:
        dk_tail *= softmax_scale
        tl.store(dk_rows[:, None] + dim_tail[None, :], dk_tail.to(dk_ptr.dtype.element_ty), mask=present[:, None])


@triton.jit
def _queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    begin_ptr,
    end_ptr,
    gate_ptr,
    lse_ptr,
    delta_ptr,
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
    stride_gt,
    stride_gh,
    stride_lt,
    stride_lh,
    stride_dt,
    stride_dh,
    num_queries,
    num_kv_heads,
    softmax_scale,
    G: tl.constexpr,
    DK: tl.constexpr,
    DK_TAIL: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """dQ of one tile of BLOCK_M (query, head) rows of one key-value head; the walk of the forward kernel."""
    first_row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    log2e: tl.constexpr = 1.4426950408889634
    scale_log2 = softmax_scale * log2e

    row = first_row + tl.arange(0, BLOCK_M)
    inside = row // G < num_queries
    token = (row // G).to(tl.int64)
    q_head = head * G + row % G
    row_begin = tl.load(begin_ptr + token, mask=inside, other=0)  # [BLOCK_M]
    row_end = tl.load(end_ptr + token, mask=inside, other=0)
    first_token = first_row // G
    last_token = tl.minimum((first_row + BLOCK_M - 1) // G, num_queries - 1)
    low, low_last = tl.load(begin_ptr + first_token), tl.load(begin_ptr + last_token)
    high_first, high = tl.load(end_ptr + first_token), tl.load(end_ptr + last_token)

    dim_k, dim_v = tl.arange(0, DK), tl.arange(0, DV)
    out_row = token * (num_kv_heads * G) + q_head
    lse_log2 = tl.load(lse_ptr + token * stride_lt + q_head * stride_lh, mask=inside, other=0.0) * log2e
    delta = tl.load(delta_ptr + token * stride_dt + q_head * stride_dh, mask=inside, other=0.0)
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
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        if (start < low_last) | (start + BLOCK_N > high_first):
            visible = (key[None, :] >= row_begin[:, None]) & (key[None, :] < row_end[:, None])
            p = tl.where(visible, p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if DK_TAIL > 0:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)

    # A row of P has one gate, which thus multiplies dQ; P itself stays as it is.
    factor = tl.full([BLOCK_M], softmax_scale, tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + token * stride_gt + q_head * stride_gh, mask=inside, other=0.0)
        factor *= gate.to(tl.float32)
    dq_rows = dq_ptr + out_row * (DK + DK_TAIL)
    dq *= factor[:, None]
    tl.store(dq_rows[:, None] + dim_k[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside[:, None])
    if DK_TAIL > 0:
        dq_tail *= factor[:, None]
        tl.store(dq_rows[:, None] + dim_tail[None, :], dq_tail.to(dq_ptr.dtype.element_ty), mask=inside[:, None])


def window_gradients(
    grad_out: Tensor,
    gate: Tensor | None,
    delta: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v, whose last strides must be 1."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    grad_out = unit_stride(grad_out)
    tensors = (q, k, v, begin, end, gate, lse, delta, grad_out)
    statistics = (delta if gate is None else gate, lse, delta)
    strides = (*token_head_strides(q, k, v, grad_out), *(s for t in statistics for s in t.stride()))
    dims = {**kernel_dims(q, k, v), "HAS_GATE": gate is not None}
    tiles = window_tiles(q.shape[2], q.shape[1] // k.shape[1], q.element_size())
    num_queries, (num_keys, num_kv_heads) = q.shape[0], k.shape[:2]
    if num_keys:
        _keys_kernel[(triton.cdiv(num_keys, KEY_TILE), num_kv_heads)](
            *(*tensors, _seeing_queries(begin, end, num_keys)),
            *(dk, dv),
            *(*strides, num_keys, num_kv_heads, softmax_scale),
            **dims,
            **tiles.keys.launch(),
        )
    num_rows = num_queries * (q.shape[1] // num_kv_heads)
    _queries_kernel[(triton.cdiv(num_rows, tiles.queries.block_m), num_kv_heads)](
        *tensors,
        dq,
        *(*strides, num_queries, num_kv_heads, softmax_scale),
        **dims,
        **tiles.queries.launch(),
    )
    return dq, dk, dv


def _seeing_queries(begin: Tensor, end: Tensor, num_keys: int) -> Tensor:
    """Which queries see each key tile: int32 [tiles, 4], found by bisection as begin and end do not decrease.

    Queries [0] .. [3] see some key of rows [first, last] of the tile, queries [1] .. [2] all of them.

    With a window of 3 over 6 tokens, begin = 0 0 0 1 2 3 and end = 1 2 3 4 5 6: a tile of rows 2 and 3 is seen by
    queries 2 .. 6 (exclusive), wholly by queries 3 .. 5.
    """
    first = torch.arange(0, num_keys, KEY_TILE, dtype=torch.int32, device=begin.device)
    last = (first + (KEY_TILE - 1)).clamp_(max=num_keys - 1)
    bounds = [
        torch.searchsorted(end, first, right=True),  # the first query with end > first
        torch.searchsorted(end, last, right=True),
        torch.searchsorted(begin, first, right=True),  # one past the last query with begin <= first
        torch.searchsorted(begin, last, right=True),
    ]
    return torch.stack(bounds, 1).to(torch.int32)
