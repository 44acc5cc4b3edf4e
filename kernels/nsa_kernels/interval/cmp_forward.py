"""Attention of every query to one interval of key rows: the compressed branch (section 3.3.1).

    s[t, h, i] = softmax_scale * q[t, h] . k[i, h // G]          for begin[t] <= i < end[t]
    out[t, h]  = sum_i softmax(s[t, h])[i] * v[i, h // G]        softmax_lse[t, h] = log sum_i exp(s[t, h, i])

A tile is BLOCK_M *rows* of one key-value head; row r is query r // G and head r % G of the group, so that every G
fills a tile: 128 rows are 8 queries of 16 heads, or 128 queries of one head. On Hopper GPUs `hopper_forward` takes the
usual sizes.

Shapes      T = query tokens here, M = compressed blocks of the whole sequence, G = Hq // Hkv
    q       [T, Hq, Dk]      bf16, fp16 or fp32; strides over T and Hq in whole 16 bytes (else copied)
    k, v    [M, Hkv, Dk], [M, Hkv, Dv]      Dv a power of two of at least 16, Dk too or the sum of two (192)
    begin, end               int32 [T], both non-decreasing; begin == end: the row is (out = 0, lse = -inf)
    returns out [T, Hq, Dv] in the dtype of q, softmax_lse fp32 [T, Hq], natural log; both may receive gradients
Numerics    tensor cores take the input dtype and add up in fp32; the softmax is fp32. Key tiles begin at multiples of
            BLOCK_N whatever the query tile, and a tile that a row does not see leaves its state as it was, so the bits
            of a row depend on neither its neighbours nor its place in the tile.
Work        2 * (Dk + Dv) FLOP a visible (query, head, key)
Reference   nsa_kernels.reference.compressed_attention
Source      Dao 2023, arXiv:2307.08691; the rows of a group in one tile: Ainslie et al. 2023, arXiv:2305.13245
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.common.deltas import row_deltas
from nsa_kernels.common.hopper import hopper_takes
from nsa_kernels.common.sizes import cdiv
from nsa_kernels.common.tiles import (
    check_attention_inputs,
    copyable_by_tma,
    dot_precision,
    kv_descriptors,
    row_offsets,
    split_head_dim,
)
from nsa_kernels.common.wild import tamed, wild_rows
from nsa_kernels.interval import hopper_forward
from nsa_kernels.interval.attention import compressed_attention_backward

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


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


def _forward_tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """H200, bf16, 65,536 tokens, D 128, ms for (Hq, Hkv) = (64, 4).

    BLOCK_M, BLOCK_N, warps, stages: 128, 64, 8, 2 in 128 registers, so that two tiles share a multiprocessor, 9.4;
    64, 64, 4, 3 10.0; 128, 128, 8, 2 9.9; with pointers in place of the copy engine 9.9 to 10.9.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if head_dim <= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def _attend(q, k, v, begin, end, out, lse, softmax_scale, apart) -> None:
    num_queries, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[:2]
    group = num_q_heads // num_kv_heads
    dim_a, dim_b = split_head_dim(head_dim)
    tile = _forward_tile(max(head_dim, v.shape[2]), q.dtype)
    _forward_kernel[(cdiv(num_queries * group, tile["BLOCK_M"]) * num_kv_heads,)](
        q, *kv_descriptors(k, v, tile["BLOCK_N"]), begin, end,
        out, lse,
        num_queries * group, num_keys, num_kv_heads, softmax_scale,
        *q.stride()[:2],
        G=group, DK_A=dim_a, DK_B=dim_b, DV=v.shape[2], PRECISION=dot_precision(q.dtype), APART=apart, **tile,
    )  # fmt: skip


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, begin, end, softmax_scale, aligned):
        q, k, v = (copyable_by_tma(x) for x in (q, k, v))
        num_queries, num_q_heads, head_dim = q.shape
        out = q.new_empty(num_queries, num_q_heads, v.shape[2])
        lse = q.new_empty(num_queries, num_q_heads, dtype=torch.float32)
        ctx.options = {"softmax_scale": softmax_scale, "aligned": aligned}
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, begin, end, out, lse)
        if k.shape[0] == 0 or num_queries == 0:
            return out.zero_(), lse.fill_(float("-inf"))
        if hopper_takes(q, k, aligned) and head_dim == v.shape[2]:
            hopper_forward.attend(q, k, v, begin, end, out, lse, softmax_scale)
        else:
            _attend(q, k, v, begin, end, out, lse, softmax_scale, aligned is not True)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, begin, end, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_out = copyable_by_tma(grad_out)
        delta = row_deltas(out, grad_out, grad_lse)
        grads = compressed_attention_backward(grad_out, None, delta, lse, q, k, v, begin, end, **ctx.options)
        return *grads, None, None, None, None


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *, softmax_scale: float, aligned: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the compressed blocks it may see, rows `[begin[t], end[t])` (section 3.3.1).

    q [T, Hq, Dk]   k [M, Hkv, Dk]   v [M, Hkv, Dv]   begin, end int32 [T], both non-decreasing
    aligned     whether documents begin where `wild.WHOLE_TILES` says. True: tiles hold one document each, so NaN of one
                reaches no other. False: the plain kernels keep rows apart one by one. None: it is not known; they
                do so, but the kernels for Hopper, which cannot, are used all the same
    returns out [T, Hq, Dv] in the dtype of q, softmax_lse [T, Hq]
    raises ValueError on shapes and dtypes that do not fit together
    """
    check_attention_inputs(q, k, v, begin, end, softmax_scale)
    return _CompressedAttention.apply(q, k, v, begin.contiguous(), end.contiguous(), softmax_scale, aligned)
