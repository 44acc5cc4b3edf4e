"""The forward of compressed attention in plain Triton: a program owns BLOCK_M rows and walks the keys they see.

A tile is BLOCK_M *rows* of one key-value head; row r is query r // G and head r % G of the group, so that every G
fills a tile: 128 rows are 8 queries of 16 heads, or 128 queries of one head. Shapes: see `attention`.

Numerics    Key tiles begin at multiples of BLOCK_N whatever the query tile, and a tile that a row does not see leaves
            its state as it was, so the bits of a row depend on neither its neighbours nor its place in the tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, split_head_dim
from nsa_kernels.common.tiles import dot_precision, kv_descriptors, row_offsets
from nsa_kernels.common.wild import tamed, wild_rows
from nsa_kernels.interval.tiles import cmp_forward_tile

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@launchable
@triton.jit
def _forward_kernel(
    q_ptr, k_a_desc, k_b_desc, v_desc, begin_ptr, end_ptr,
    out_ptr, lse_ptr,
    num_rows, num_keys, num_heads_kv, softmax_scale,
    stride_qt, stride_qh,
    G: tl.constexpr, DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    # The last tiles see most keys: they start first.
    head = tl.program_id(0) % num_heads_kv
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // num_heads_kv
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < num_rows
    row = tl.minimum(row, num_rows - 1)  # past the end: the last row again, not stored
    begin = tl.load(begin_ptr + row // G)
    end = tl.load(end_ptr + row // G)
    first = tl.min(tl.where(begin < end, begin, num_keys))
    last = tl.max(tl.where(begin < end, end, 0))
    all_begun = tl.max(begin)  # keys in [all_begun, none_ended) are visible to every row
    none_ended = tl.min(end)

    dim_a = tl.arange(0, DK_A)
    dim_v = tl.arange(0, DV)
    q_rows = q_ptr + row_offsets(row, head, stride_qt, stride_qh, G)[:, None]
    q_a = tl.load(q_rows + dim_a)  # [BLOCK_M, DK_A]
    if DK_B:
        dim_b = DK_A + tl.arange(0, DK_B)
        q_b = tl.load(q_rows + dim_b)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the largest score so far, before scaling
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    scale = softmax_scale * LOG2_E
    for start in tl.range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        k_a = tl.reshape(k_a_desc.load([start, head, 0]), [BLOCK_N, DK_A])
        s = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DK_B:
            k_b = tl.reshape(k_b_desc.load([start, head, DK_A]), [BLOCK_N, DK_B])
            s = tl.dot(q_b, tl.trans(k_b), s, input_precision=PRECISION)
        v = tl.reshape(v_desc.load([start, head, 0]), [BLOCK_N, DV])
        key = start + tl.arange(0, BLOCK_N)
        at_edge = (start < all_begun) | (start + BLOCK_N > none_ended)
        if at_edge:
            s = tl.where((key >= begin[:, None]) & (key < end[:, None]), s, float("-inf"))

        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top) * scale  # a row without a key yet: exp2(-inf - 0)
        p = tl.exp2(tl.fma(s, scale, -base[:, None]))
        alpha = tl.exp2(tl.fma(top, scale, -base))
        total = total * alpha + tl.sum(p, 1)
        if APART and at_edge:
            seen = (key >= begin[:, None]) & (key < end[:, None])
            p = tl.where(seen & wild_rows(v)[None, :], float("nan"), p)
            v = tamed(v)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        top = new_top

    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    out_rows = out_ptr + row_offsets(row, head, num_heads_kv * G * DV, DV, G)[:, None]
    tl.store(out_rows + dim_v, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    lse = tl.where(seen, (top * scale + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse_ptr + row_offsets(row, head, num_heads_kv * G, 1, G), lse, mask=live)


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
) -> None:
    """Writes out [T, Hq, Dv] and lse [T, Hq], both contiguous. `apart`: see `wild`."""
    num_queries, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[:2]
    group = num_q_heads // num_kv_heads
    dim_a, dim_b = split_head_dim(head_dim)
    tile = cmp_forward_tile(max(head_dim, v.shape[2]), q.dtype)
    _forward_kernel[(cdiv(num_queries * group, tile["BLOCK_M"]) * num_kv_heads,)](
        q, *kv_descriptors(k, v, tile["BLOCK_N"]), begin, end,
        out, lse,
        num_queries * group, num_keys, num_kv_heads, softmax_scale,
        *q.stride()[:2],
        G=group, DK_A=dim_a, DK_B=dim_b, DV=v.shape[2], PRECISION=dot_precision(q.dtype), APART=apart, **tile,
    )  # fmt: skip
