"""dK and dV, of both branches: a program owns BLOCK_N keys and walks the rows that see them. See `attention`.

    P_g = gate * P        dV = P_g^T dO        dK = scale * (P_g * (dO V^T - delta))^T Q

Each program takes one part of its keys' rows; see `parts`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, split_head_dim
from nsa_kernels.common.tiles import dot_precision, row_offsets, tile_descriptor
from nsa_kernels.common.wild import tamed, wild_rows
from nsa_kernels.interval.parts import num_splits, sum_parts, tile_ranges
from nsa_kernels.interval.statistics import load_statistics
from nsa_kernels.interval.tiles import grad_kv_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@launchable
@triton.jit
def _grad_kv_kernel(
    q_ptr, q_a_desc, q_b_desc, k_ptr, v_ptr, begin_ptr, end_ptr, statistics_ptr, grad_out_ptr, grad_out_desc,
    tile_range_ptr,
    grad_k_ptr, grad_v_ptr,
    num_padded_rows, num_keys, num_heads_kv, num_key_tiles, softmax_scale,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gt, stride_gh,
    NUM_SPLITS: tl.constexpr, BY_TMA: tl.constexpr,
    G: tl.constexpr, DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Partial dK and dV of BLOCK_N keys over one part of the rows that see them, all transposed: keys on M."""
    # The first key tiles are seen by most queries: they start first.
    part = tl.program_id(0) % NUM_SPLITS
    head = tl.program_id(0) // NUM_SPLITS % num_heads_kv
    tile = tl.program_id(0) // NUM_SPLITS // num_heads_kv
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key_row = tl.minimum(key, num_keys - 1).to(tl.int64)

    # The first row that sees a key of this tile, or one before: tiles of rows lie where they hold one document each.
    seen_from = tl.load(tile_range_ptr + tile) * G // BLOCK_M * BLOCK_M
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
        base, delta, gate = load_statistics(statistics_ptr, row_in, head, num_padded_rows, num_heads_kv)
        p = tl.exp2(tl.fma(s, scale, -base[None, :])) * gate[None, :]
        grad_s = p * (grad_p - delta[None, :])
        if (start < full_from) | (start + BLOCK_M > tl.minimum(full_to, seen_to)):
            begin = tl.load(begin_ptr + row_in // G)[None, :]
            end = tl.load(end_ptr + row_in // G)[None, :]
            seen = (key[:, None] >= begin) & (key[:, None] < end) & (row < seen_to)[None, :]
            grad_s = tl.where(seen, grad_s, 0.0)
            if APART:
                p = tl.where(wild_rows(grad_out)[None, :], float("nan"), p)
                grad_out = tamed(grad_out)
                q_a = tamed(q_a)
                if DK_B:
                    q_b = tamed(q_b)
            p = tl.where(seen, p, 0.0)
        grad_v = tl.dot(p.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_s = grad_s.to(v.dtype)
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


def grad_kv(
    q, k, v, begin, end, statistics, grad_out, softmax_scale, dtype=None, *, apart
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK [M, Hkv, Dk] and dV [M, Hkv, Dv] in `dtype`; None: that of k. `apart`: see `wild`."""
    num_q_heads, head_dim = q.shape[1:]
    num_keys, num_kv_heads = k.shape[:2]
    group = num_q_heads // num_kv_heads
    dim_a, dim_b = split_head_dim(head_dim)
    tile = grad_kv_tile(max(head_dim, v.shape[2]), q.dtype)
    num_key_tiles = cdiv(num_keys, tile["BLOCK_N"])
    splits = num_splits(num_key_tiles * num_kv_heads)
    grad_k = torch.empty(splits, *k.shape, dtype=torch.float32, device=k.device)
    grad_v = torch.empty(splits, *v.shape, dtype=torch.float32, device=v.device)
    # A group that does not divide the tile straddles it: its rows are then loaded through pointers.
    by_tma = tile["BLOCK_M"] % group == 0
    rows, heads = (tile["BLOCK_M"] // group, group) if by_tma else (tile["BLOCK_M"], 1)
    _grad_kv_kernel[(num_key_tiles * num_kv_heads * splits,)](
        q, tile_descriptor(q, rows, heads, dim_a), tile_descriptor(q, rows, heads, dim_b or dim_a),
        k, v, begin, end, statistics, grad_out, tile_descriptor(grad_out, rows, heads, v.shape[2]),
        tile_ranges(begin, end, num_keys, tile["BLOCK_N"]),
        grad_k, grad_v,
        statistics.shape[2], num_keys, num_kv_heads, num_key_tiles, softmax_scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2],
        NUM_SPLITS=splits, BY_TMA=by_tma,
        G=group, DK_A=dim_a, DK_B=dim_b, DV=v.shape[2], PRECISION=dot_precision(q.dtype), APART=apart, **tile,
    )  # fmt: skip
    return sum_parts(grad_k, grad_v, dtype or k.dtype)
