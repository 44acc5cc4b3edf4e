"""The forward of window attention in plain Triton. Shapes: see `attention`; keys may begin before the first query.

Tiles       The rows of a tile are queries x heads of one group, flattened: 128 rows at G = 16 are 8 queries, which
            span 9 key tiles of 64 at a window of 512, where 128 queries of one head span 10. K/V traffic is the same.
Numerics    Scores, softmax and accumulators in fp32; P is rounded to the dtype of v for the tensor cores, out once.
            Key tiles lie at multiples of 64 rows whatever the queries are, and a tile that a row does not see leaves
            its registers as they were: the bits of a row do not depend on the rows that share its tile.
Source      Dao 2023, arXiv:2307.08691 (online softmax); Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.rows import token_head_strides
from nsa_kernels.common.wild import tamed, wild_rows
from nsa_kernels.interval.tiles import num_tiles, rows_of_tile, window_dims, window_tiles


@launchable
@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    begin_ptr,
    end_ptr,
    spans_ptr,
    out_ptr,
    lse_ptr,
    stride_qt,
    stride_qh,
    stride_kr,
    stride_kh,
    stride_vr,
    stride_vh,
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
    APART: tl.constexpr,
):
    """One tile of BLOCK_M (query, head) rows of one key-value head against the key rows its queries see."""
    first_row, stop_row = rows_of_tile(tl.program_id(0), spans_ptr, num_queries, G, BLOCK_M)
    head = tl.program_id(1)
    log2e: tl.constexpr = 1.4426950408889634
    scale_log2 = softmax_scale * log2e

    row = first_row + tl.arange(0, BLOCK_M)
    token = row // G
    inside = row < stop_row
    q_head = head * G + row % G
    row_begin = tl.load(begin_ptr + token, mask=inside, other=0)  # [BLOCK_M]
    row_end = tl.load(end_ptr + token, mask=inside, other=0)

    # begin and end do not decrease, so the first and the last query bound the tile.
    first_token = first_row // G
    last_token = (tl.minimum(first_row + BLOCK_M, stop_row) - 1) // G
    low, low_last = tl.load(begin_ptr + first_token), tl.load(begin_ptr + last_token)
    high_first, high = tl.load(end_ptr + first_token), tl.load(end_ptr + last_token)

    dk, dv = tl.arange(0, DK), tl.arange(0, DV)
    q_rows = q_ptr + token.to(tl.int64) * stride_qt + q_head.to(tl.int64) * stride_qh
    q = tl.load(q_rows[:, None] + dk[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_M, DK]
    if DK_TAIL > 0:
        dk_tail = DK + tl.arange(0, DK_TAIL)
        q_tail = tl.load(q_rows[:, None] + dk_tail[None, :], mask=inside[:, None], other=0.0)
    k_head = k_ptr + head.to(tl.int64) * stride_kh
    v_head = v_ptr + head.to(tl.int64) * stride_vh

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)  # in units of log2, scale included
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    for start in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # Rows that no query of the tile sees may hold anything, NaN included: 0 * NaN must not reach acc.
        seen = (key >= low) & (key < high)
        k_rows = k_head + key.to(tl.int64) * stride_kr
        k = tl.load(k_rows[:, None] + dk[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, DK]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DK_TAIL > 0:
            k_tail = tl.load(k_rows[:, None] + dk_tail[None, :], mask=seen[:, None], other=0.0)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
        at_edge = (start < low_last) | (start + BLOCK_N > high_first)
        if at_edge:
            visible = (key[None, :] >= row_begin[:, None]) & (key[None, :] < row_end[:, None])
            s = tl.where(visible, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
        p = tl.exp2(s * scale_log2 - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        v_rows = v_head + key.to(tl.int64) * stride_vr
        v = tl.load(v_rows[:, None] + dv[None, :], mask=seen[:, None], other=0.0)  # [BLOCK_N, DV]
        if APART and at_edge:
            visible = (key[None, :] >= row_begin[:, None]) & (key[None, :] < row_end[:, None])
            p = tl.where(visible & wild_rows(v)[None, :], float("nan"), p)
            v = tamed(v)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out_row = token.to(tl.int64) * (num_kv_heads * G) + q_head
    out_ptrs = out_ptr + out_row[:, None] * DV + dv[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(lse_ptr + out_row, (row_max + tl.log2(row_sum)) / log2e, mask=inside)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    apart: bool,
    spans: Tensor | None = None,
) -> None:
    """Writes out [T, Hq, Dv] and lse [T, Hq], both contiguous. `apart`: see `wild`; `spans`: see `rows_of_tile`."""
    tile = window_tiles(q.shape[2], q.element_size()).forward
    num_queries, num_kv_heads = q.shape[0], k.shape[1]
    tiles = num_tiles(num_queries, spans, q.shape[1] // num_kv_heads, tile.block_m)
    _forward_kernel[(tiles, num_kv_heads)](
        *(q, k, v, begin, end, spans),
        *(out, lse),
        *(*token_head_strides(q, k, v), num_queries, num_kv_heads, softmax_scale),
        **window_dims(q, k, v),
        APART=apart,
        **tile.launch(),
    )
