"""Gradients of compressed attention: one kernel that owns queries (dQ), one that owns keys (dK, dV). No atomics.

    P = exp(S - lse)     dP = dO V^T     delta = rowsum(dO * O) - dlse     dS = P * (dP - delta)
    dQ = scale * dS K    dK = scale * dS^T Q    dV = P^T dO

A gradient that arrives for softmax_lse only shifts delta, since d lse / d s = P.

There are T / 16 keys and G heads to a key-value head, so a key tile is seen by many rows and there are few key tiles:
the rows of each are cut into `num_splits` equal parts, whose partial dK, dV [num_splits, M, Hkv, D] are fp32 and are
added up in order, so two runs give the same bits.

Shapes      as in cmp_attention; rows, tiles and head dims in two parts too
Numerics    fp32 accumulation; P and dS enter the tensor cores in the input dtype; each gradient is rounded once
Work        dQ 4 * Dk + 2 * Dv, dK and dV 4 * Dk + 4 * Dv FLOP a visible (query, head, key)
Reference   nsa_kernels.reference.compressed_attention
Source      Dao 2023, arXiv:2307.08691, section 3.1
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.cmp_tiles import (
    copyable_by_tma,
    dot_precision,
    kv_descriptors,
    row_offsets,
    split_head_dim,
    tile_descriptor,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _grad_q_kernel(
    q_ptr, k_a_desc, k_b_desc, v_desc, begin_ptr, end_ptr, out_ptr, lse_ptr, grad_out_ptr, grad_lse_ptr,
    delta_ptr, grad_q_ptr,
    num_rows, num_keys, num_heads_kv, softmax_scale,
    stride_qt, stride_qh, stride_gt, stride_gh, stride_lt, stride_lh,
    HAS_GRAD_LSE: tl.constexpr,
    G: tl.constexpr, DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows, and their delta, which the kernel of dK and dV reads."""
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
    out = tl.load(out_ptr + row_offsets(row, head, num_heads_kv * G * DV, DV, G)[:, None] + dim_v)
    lse = tl.load(lse_ptr + row_offsets(row, head, num_heads_kv * G, 1, G))
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + row_offsets(row, head, stride_lt, stride_lh, G))
    # A row without keys has lse = -inf and takes no gradient, not even a NaN one.
    seen = begin < end
    delta = tl.where(seen, delta, 0.0)
    base = tl.where(seen, lse, 0.0) * LOG2_E
    tl.store(delta_ptr + row_offsets(row, head, num_heads_kv * G, 1, G), delta, mask=live)

    scale = softmax_scale * LOG2_E
    for start in tl.range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        k_a = tl.reshape(k_a_desc.load([start, head, 0]), [BLOCK_N, DK_A])
        s = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DK_B:
            k_b = tl.reshape(k_b_desc.load([start, head, DK_A]), [BLOCK_N, DK_B])
            s = tl.dot(q_b, tl.trans(k_b), s, input_precision=PRECISION)
        v = tl.reshape(v_desc.load([start, head, 0]), [BLOCK_N, DV])
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        if (start < all_begun) | (start + BLOCK_N > none_ended):
            key = start + tl.arange(0, BLOCK_N)
            s = tl.where((key >= begin[:, None]) & (key < end[:, None]), s, float("-inf"))
        p = tl.exp2(tl.fma(s, scale, -base[:, None]))
        grad_s = (p * (grad_p - delta[:, None])).to(k_a.dtype)
        grad_q_a = tl.dot(grad_s, k_a, grad_q_a, input_precision=PRECISION)
        if DK_B:
            grad_q_b = tl.dot(grad_s, k_b, grad_q_b, input_precision=PRECISION)

    grad_q_rows = grad_q_ptr + row_offsets(row, head, num_heads_kv * G * (DK_A + DK_B), DK_A + DK_B, G)[:, None]
    tl.store(grad_q_rows + dim_a, (grad_q_a * softmax_scale).to(q_a.dtype), mask=live[:, None])
    if DK_B:
        tl.store(grad_q_rows + dim_b, (grad_q_b * softmax_scale).to(q_a.dtype), mask=live[:, None])


@triton.jit
def _grad_kv_kernel(
    q_ptr, q_a_desc, q_b_desc, k_ptr, v_ptr, begin_ptr, end_ptr, lse_ptr, delta_ptr, grad_out_ptr, grad_out_desc,
    tile_range_ptr,
    grad_k_ptr, grad_v_ptr,
    num_keys, num_heads_kv, num_key_tiles, softmax_scale,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gt, stride_gh,
    NUM_SPLITS: tl.constexpr, BY_TMA: tl.constexpr,
    G: tl.constexpr, DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial dK and dV of BLOCK_N keys over one part of the rows that see them, all transposed: keys on M."""
    # The first key tiles are seen by most queries: they start first.
    part = tl.program_id(0) % NUM_SPLITS
    head = tl.program_id(0) // NUM_SPLITS % num_heads_kv
    tile = tl.program_id(0) // NUM_SPLITS // num_heads_kv
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key_row = tl.minimum(key, num_keys - 1).to(tl.int64)

    seen_from = tl.load(tile_range_ptr + tile) * G  # the first row that sees a key of this tile
    seen_to = tl.load(tile_range_ptr + num_key_tiles + tile) * G
    full_from = tl.load(tile_range_ptr + 2 * num_key_tiles + tile) * G  # rows in [full_from, full_to) see all keys
    full_to = tl.load(tile_range_ptr + 3 * num_key_tiles + tile) * G
    rows_per_part = tl.cdiv(tl.cdiv(tl.maximum(seen_to - seen_from, 0), NUM_SPLITS), BLOCK_M) * BLOCK_M
    seen_from += part * rows_per_part
    seen_to = tl.minimum(seen_to, seen_from + rows_per_part)

    dim_a = tl.arange(0, DK_A)
    dim_v = tl.arange(0, DV)
    k_rows = k_ptr + head.to(tl.int64) * stride_kh + key_row[:, None] * stride_kn
    k_a = tl.load(k_rows + dim_a)  # [BLOCK_N, DK_A]
    grad_k_a = tl.zeros([BLOCK_N, DK_A], tl.float32)
    if DK_B:
        dim_b = DK_A + tl.arange(0, DK_B)
        k_b = tl.load(k_rows + dim_b)
        grad_k_b = tl.zeros([BLOCK_N, DK_B], tl.float32)
    v = tl.load(v_ptr + head.to(tl.int64) * stride_vh + key_row[:, None] * stride_vn + dim_v)  # [BLOCK_N, DV]
    grad_v = tl.zeros([BLOCK_N, DV], tl.float32)

    scale = softmax_scale * LOG2_E
    for start in tl.range(seen_from, seen_to, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        row_in = tl.minimum(row, seen_to - 1)
        if BY_TMA:
            q_a = tl.reshape(q_a_desc.load([start // G, head * G, 0]), [BLOCK_M, DK_A])
            grad_out = tl.reshape(grad_out_desc.load([start // G, head * G, 0]), [BLOCK_M, DV])
        else:
            q_rows = q_ptr + row_offsets(row_in, head, stride_qt, stride_qh, G)[:, None]
            q_a = tl.load(q_rows + dim_a)
            grad_out = tl.load(grad_out_ptr + row_offsets(row_in, head, stride_gt, stride_gh, G)[:, None] + dim_v)
        s = tl.dot(k_a, tl.trans(q_a), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if DK_B:
            if BY_TMA:
                q_b = tl.reshape(q_b_desc.load([start // G, head * G, DK_A]), [BLOCK_M, DK_B])
            else:
                q_b = tl.load(q_rows + dim_b)
            s = tl.dot(k_b, tl.trans(q_b), s, input_precision=PRECISION)
        grad_p = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        statistic = row_offsets(row_in, head, num_heads_kv * G, 1, G)
        lse = tl.load(lse_ptr + statistic)
        p = tl.exp2(tl.fma(s, scale, -(lse * LOG2_E)[None, :]))
        if (start < full_from) | (start + BLOCK_M > tl.minimum(full_to, seen_to)):
            begin = tl.load(begin_ptr + row_in // G)[None, :]
            end = tl.load(end_ptr + row_in // G)[None, :]
            visible = (key[:, None] >= begin) & (key[:, None] < end) & (row < seen_to)[None, :]
            p = tl.where(visible, p, 0.0)  # after exp2: a row without keys has lse = -inf
        grad_v = tl.dot(p.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_s = (p * (grad_p - tl.load(delta_ptr + statistic)[None, :])).to(v.dtype)
        grad_k_a = tl.dot(grad_s, q_a, grad_k_a, input_precision=PRECISION)
        if DK_B:
            grad_k_b = tl.dot(grad_s, q_b, grad_k_b, input_precision=PRECISION)

    inside = (key < num_keys)[:, None]
    slot = ((part * num_keys + key_row) * num_heads_kv + head)[:, None]  # [BLOCK_N, 1], a row of [parts, M, Hkv]
    grad_k_rows = grad_k_ptr + slot * (DK_A + DK_B)
    tl.store(grad_k_rows + dim_a, grad_k_a * softmax_scale, mask=inside)
    if DK_B:
        tl.store(grad_k_rows + dim_b, grad_k_b * softmax_scale, mask=inside)
    tl.store(grad_v_ptr + slot * DV + dim_v, grad_v, mask=inside)


def _grad_q_tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """H200, bf16, 65,536 tokens, D 128, ms for (Hq, Hkv) = (64, 4), this kernel alone, twice in a row.

    BLOCK_M, BLOCK_N, warps, stages: 64, 64, 4, 2, of which two share a multiprocessor, 10.7 (615 TFLOP/s);
    128, 64, 8, 3 11.8; 128, 128, 8, 2 12.1; 128, 64, 8, 2 12.7.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if head_dim <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def _grad_kv_tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """As above: 64, 64, 4, 2 19.4 (453 TFLOP/s); 64, 128, 8, 2 23.2; 64, 128, 8, 3 25.6.

    dK and dV by kernels of their own, S computed twice: 17.9 + 13.4 at best.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if head_dim <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def _tile_ranges(begin: Tensor, end: Tensor, num_keys: int, block_n: int) -> Tensor:
    """Which queries see each key tile: int32 [4, tiles], rows seen_from, seen_to, full_from, full_to.

    Queries [seen_from, seen_to) see some key of the tile, [full_from, full_to) all of them. For 4 queries with
    begin = 0, end = 0, 1, 2, 3 and tiles of 2 keys, three keys in all: 1, 4, 2, 4 and 3, 4, 3, 4.
    """
    tile_begin = torch.arange(0, num_keys, block_n, dtype=torch.int32, device=begin.device)
    tile_end = (tile_begin + block_n).clamp(max=num_keys)
    ranges = (
        torch.searchsorted(end, tile_begin, right=True, out_int32=True),
        torch.searchsorted(begin, tile_end, out_int32=True),
        torch.searchsorted(end, tile_end, out_int32=True),
        torch.searchsorted(begin, tile_begin, right=True, out_int32=True),
    )
    return torch.stack(ranges)


def _num_splits(num_items: int) -> int:
    """Parts per key tile: at least four work items for each of 132 multiprocessors, but 16 parts at most."""
    return max(1, min(16, triton.next_power_of_2(triton.cdiv(4 * 132, num_items))))


def compressed_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ [T, Hq, Dk], dK [M, Hkv, Dk] and dV [M, Hkv, Dv] in the dtypes of q, k and v."""
    if k.shape[0] == 0 or q.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_out = copyable_by_tma(grad_out)
    grad_q, delta = _launch_grad_q(q, k, v, begin, end, out, lse, grad_out, grad_lse, softmax_scale)
    grad_k, grad_v = _launch_grad_kv(q, k, v, begin, end, lse, delta, grad_out, softmax_scale)
    return grad_q, grad_k, grad_v


def _launch_grad_q(q, k, v, begin, end, out, lse, grad_out, grad_lse, softmax_scale) -> tuple[Tensor, Tensor]:
    num_queries, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[:2]
    group = num_q_heads // num_kv_heads
    dim_a, dim_b = split_head_dim(head_dim)
    tile = _grad_q_tile(max(head_dim, v.shape[2]), q.dtype)
    grad_q, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    _grad_q_kernel[(triton.cdiv(num_queries * group, tile["BLOCK_M"]) * num_kv_heads,)](
        q, *kv_descriptors(k, v, tile["BLOCK_N"]), begin, end, out, lse, grad_out, grad_lse,
        delta, grad_q,
        num_queries * group, num_keys, num_kv_heads, softmax_scale,
        *q.stride()[:2], *grad_out.stride()[:2], *((0, 0) if grad_lse is None else grad_lse.stride()),
        HAS_GRAD_LSE=grad_lse is not None,
        G=group, DK_A=dim_a, DK_B=dim_b, DV=v.shape[2], PRECISION=dot_precision(q.dtype), **tile,
    )  # fmt: skip
    return grad_q, delta


def _launch_grad_kv(q, k, v, begin, end, lse, delta, grad_out, softmax_scale) -> tuple[Tensor, Tensor]:
    num_q_heads, head_dim = q.shape[1:]
    num_keys, num_kv_heads = k.shape[:2]
    group = num_q_heads // num_kv_heads
    dim_a, dim_b = split_head_dim(head_dim)
    tile = _grad_kv_tile(max(head_dim, v.shape[2]), q.dtype)
    num_key_tiles = triton.cdiv(num_keys, tile["BLOCK_N"])
    num_splits = _num_splits(num_key_tiles * num_kv_heads)
    grad_k = torch.empty(num_splits, *k.shape, dtype=torch.float32, device=k.device)
    grad_v = torch.empty(num_splits, *v.shape, dtype=torch.float32, device=v.device)
    # A group that does not divide the tile straddles it: its rows are then loaded through pointers.
    by_tma = tile["BLOCK_M"] % group == 0
    rows, heads = (tile["BLOCK_M"] // group, group) if by_tma else (tile["BLOCK_M"], 1)
    _grad_kv_kernel[(num_key_tiles * num_kv_heads * num_splits,)](
        q, tile_descriptor(q, rows, heads, dim_a), tile_descriptor(q, rows, heads, dim_b or dim_a),
        k, v, begin, end, lse, delta, grad_out, tile_descriptor(grad_out, rows, heads, v.shape[2]),
        _tile_ranges(begin, end, num_keys, tile["BLOCK_N"]),
        grad_k, grad_v,
        num_keys, num_kv_heads, num_key_tiles, softmax_scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2],
        NUM_SPLITS=num_splits, BY_TMA=by_tma,
        G=group, DK_A=dim_a, DK_B=dim_b, DV=v.shape[2], PRECISION=dot_precision(q.dtype), **tile,
    )  # fmt: skip
    return grad_k.sum(0).to(k.dtype), grad_v.sum(0).to(v.dtype)
