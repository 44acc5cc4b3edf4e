"""dQ of compressed attention: a program owns BLOCK_M rows and walks the keys they see. See `attention`.

dQ = scale * gate * (P * (dO V^T - delta)) K          the gate of a row multiplies its finished sum
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, split_head_dim
from nsa_kernels.common.tiles import dot_precision, kv_descriptors, row_offsets
from nsa_kernels.common.wild import tamed
from nsa_kernels.interval.statistics import load_statistics
from nsa_kernels.interval.tiles import cmp_grad_q_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@launchable
@triton.jit
def _grad_q_kernel(
    q_ptr, k_a_desc, k_b_desc, v_desc, begin_ptr, end_ptr, statistics_ptr, grad_out_ptr,
    grad_q_ptr,
    num_rows, num_padded_rows, num_keys, num_heads_kv, softmax_scale,
    stride_qt, stride_qh, stride_gt, stride_gh,
    G: tl.constexpr, DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads_kv
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // num_heads_kv
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    begin = tl.load(begin_ptr + row // G)
    end = tl.load(end_ptr + row // G)
    first = tl.min(tl.where(begin < end, begin, num_keys))
    last = tl.max(tl.where(begin < end, end, 0))
    all_begun = tl.max(begin)
    none_ended = tl.min(end)

    dim_a = tl.arange(0, DK_A)
    dim_v = tl.arange(0, DV)
    q_rows = q_ptr + row_offsets(row, head, stride_qt, stride_qh, G)[:, None]
    q_a = tl.load(q_rows + dim_a)  # [BLOCK_M, DK_A]
    grad_q_a = tl.zeros([BLOCK_M, DK_A], tl.float32)
    if DK_B:
        dim_b = DK_A + tl.arange(0, DK_B)
        q_b = tl.load(q_rows + dim_b)
        grad_q_b = tl.zeros([BLOCK_M, DK_B], tl.float32)
    grad_out = tl.load(grad_out_ptr + row_offsets(row, head, stride_gt, stride_gh, G)[:, None] + dim_v)
    base, delta, gate = load_statistics(statistics_ptr, row, head, num_padded_rows, num_heads_kv)

    scale = softmax_scale * LOG2_E
    for start in tl.range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        k_a = tl.reshape(k_a_desc.load([start, head, 0]), [BLOCK_N, DK_A])
        s = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DK_B:
            k_b = tl.reshape(k_b_desc.load([start, head, DK_A]), [BLOCK_N, DK_B])
            s = tl.dot(q_b, tl.trans(k_b), s, input_precision=PRECISION)
        v = tl.reshape(v_desc.load([start, head, 0]), [BLOCK_N, DV])
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(tl.fma(s, scale, -base[:, None]))
        grad_s = p * (grad_p - delta[:, None])
        if (start < all_begun) | (start + BLOCK_N > none_ended):
            key = start + tl.arange(0, BLOCK_N)
            grad_s = tl.where((key >= begin[:, None]) & (key < end[:, None]), grad_s, 0.0)
            if APART:
                k_a = tamed(k_a)
                if DK_B:
                    k_b = tamed(k_b)
        grad_s = grad_s.to(k_a.dtype)
        grad_q_a = tl.dot(grad_s, k_a, grad_q_a, input_precision=PRECISION)
        if DK_B:
            grad_q_b = tl.dot(grad_s, k_b, grad_q_b, input_precision=PRECISION)

    factor = (gate * softmax_scale)[:, None]
    grad_q_rows = grad_q_ptr + row_offsets(row, head, num_heads_kv * G * (DK_A + DK_B), DK_A + DK_B, G)[:, None]
    tl.store(grad_q_rows + dim_a, (grad_q_a * factor).to(q_a.dtype), mask=live[:, None])
    if DK_B:
        tl.store(grad_q_rows + dim_b, (grad_q_b * factor).to(q_a.dtype), mask=live[:, None])


def grad_q(q, k, v, begin, end, statistics, grad_out, softmax_scale, apart) -> Tensor:
    """dQ [T, Hq, Dk] in the dtype of q. `grad_out` and k, v can be read by the copy engine. `apart`: see `wild`."""
    num_queries, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[:2]
    group = num_q_heads // num_kv_heads
    dim_a, dim_b = split_head_dim(head_dim)
    tile = cmp_grad_q_tile(max(head_dim, v.shape[2]), q.dtype)
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _grad_q_kernel[(cdiv(num_queries * group, tile["BLOCK_M"]) * num_kv_heads,)](
        q, *kv_descriptors(k, v, tile["BLOCK_N"]), begin, end, statistics, grad_out,
        result,
        num_queries * group, statistics.shape[2], num_keys, num_kv_heads, softmax_scale,
        *q.stride()[:2], *grad_out.stride()[:2],
        G=group, DK_A=dim_a, DK_B=dim_b, DV=v.shape[2], PRECISION=dot_precision(q.dtype), APART=apart, **tile,
    )  # fmt: skip
    return result
