"""Window attention: every query sees the rows `[begin[t], end[t])` of k and v (NSA, section 3.3.3).

    out[t, h] = softmax(softmax_scale * q[t, h] . k[begin[t]:end[t], h // G]) @ v[begin[t]:end[t], h // G]

Shapes      T = query tokens, R = key rows (they may begin before the first query: a halo), G = Hq // Hkv
    q           [T, Hq, Dk]     bf16, fp16 or fp32; any strides over tokens and heads
    k, v        [R, Hkv, Dk or Dv]  dtype of q
    begin, end  [T]             int32, both non-decreasing; begin == end: the row sees nothing
    out         [T, Hq, Dv]     dtype of q; 0 on a row that sees nothing
    softmax_lse [T, Hq]         fp32, natural log; -inf on a row that sees nothing
Tiles       The rows of a tile are queries x heads of one group, flattened: 128 rows at G = 16 are 8 queries, which
            span 9 key tiles of 64 at a window of 512, where 128 queries of one head span 10. K/V traffic is the same.
            On Hopper GPUs `hopper_forward` takes the place of the kernel below for head dims of 64 and 128.
Numerics    Scores, softmax and accumulators in fp32; P is rounded to the dtype of v for the tensor cores, out once.
            Key tiles lie at multiples of 64 rows whatever the queries are, and a tile that a row does not see leaves
            its registers as they were: the bits of a row do not depend on the rows that share its tile.
Gradients   dq, dk, dv, for gradients of both out and softmax_lse: win_backward.py. No atomics, so bits repeat.
Reference   nsa_kernels.reference.window_attention
Source      Dao 2023, arXiv:2307.08691 (online softmax); Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.common.deltas import row_deltas
from nsa_kernels.common.hopper import hopper_takes
from nsa_kernels.common.rows import token_head_strides, unit_stride
from nsa_kernels.common.sizes import cdiv
from nsa_kernels.common.tiles import copyable_by_tma
from nsa_kernels.common.wild import tamed, wild_rows
from nsa_kernels.interval import hopper_forward
from nsa_kernels.interval.tiles import KEY_TILE, kernel_dims, split_head_dim, window_tiles
from nsa_kernels.interval.unseen import unseen_tiles
from nsa_kernels.interval.win_grad_q import window_gradients


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    begin_ptr,
    end_ptr,
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
    first_row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    log2e: tl.constexpr = 1.4426950408889634
    scale_log2 = softmax_scale * log2e

    row = first_row + tl.arange(0, BLOCK_M)
    token = row // G
    inside = token < num_queries
    q_head = head * G + row % G
    row_begin = tl.load(begin_ptr + token, mask=inside, other=0)  # [BLOCK_M]
    row_end = tl.load(end_ptr + token, mask=inside, other=0)

    # begin and end do not decrease, so the first and the last query bound the tile.
    first_token = first_row // G
    last_token = tl.minimum((first_row + BLOCK_M - 1) // G, num_queries - 1)
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


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, begin, end, softmax_scale, aligned):
        q, k, v = (copyable_by_tma(t) for t in (q, k, v))
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        if q.numel() and k.numel() and hopper_takes(q, k, aligned) and q.shape[2] == v.shape[2]:
            unseen = unseen_tiles(begin, end, k.shape[0], KEY_TILE)
            hopper_forward.attend(q, k, v, begin, end, out, lse, softmax_scale, key_tile=KEY_TILE, unseen=unseen)
        elif q.numel():
            _launch_forward(q, k, v, begin, end, out, lse, softmax_scale, aligned is not True)
        ctx.save_for_backward(q, k, v, begin, end, out, lse)
        ctx.options = {"softmax_scale": softmax_scale, "aligned": aligned}
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, begin, end, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else unit_stride(grad_out)
        delta = row_deltas(out, grad_out, grad_lse)
        return *window_gradients(grad_out, None, delta, lse, q, k, v, begin, end, **ctx.options), *[None] * 4


def _launch_forward(
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
    tile = window_tiles(q.shape[2], q.element_size()).forward
    num_queries, num_kv_heads = q.shape[0], k.shape[1]
    num_rows = num_queries * (q.shape[1] // num_kv_heads)
    _forward_kernel[(cdiv(num_rows, tile.block_m), num_kv_heads)](
        *(q, k, v, begin, end),
        *(out, lse),
        *(*token_head_strides(q, k, v), num_queries, num_kv_heads, softmax_scale),
        **kernel_dims(q, k, v),
        APART=apart,
        **tile.launch(),
    )


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *, softmax_scale: float, aligned: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every query to its window, rows `[begin[t], end[t])` of k and v: (out, softmax_lse).

    Shapes, dtypes and numerics: the docstring of this file; `aligned` as in `compressed_attention`. Raises ValueError
    on shapes that do not fit, on head dims that no tile covers, and on a softmax_scale that is not positive.
    """
    _check(q, k, v, begin, end, softmax_scale)
    return _WindowAttention.apply(q, k, v, begin.contiguous(), end.contiguous(), softmax_scale, aligned)


def window_attention_backward(
    grad_out: Tensor,
    gate: Tensor | None,
    delta: Tensor,
    softmax_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    softmax_scale: float,
    kv_dtype: torch.dtype | None = None,
    aligned: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `gate * window_attention(q, k, v, begin, end)`, in the dtypes of q, k, v.

    grad_out    [T, Hq, Dv]     of `gate * out`, or of a sum that it is a term of
    gate        [T, Hq]         of either sign; None: ones
    delta       fp32 [T, Hq]    rowsum(grad_out * out), of `out` without its gate
    softmax_lse fp32 [T, Hq]    as `window_attention` returned it; these four of any strides
    kv_dtype                    of dk and dv instead, for sums that go on elsewhere
    aligned                     as `compressed_attention`

    Raises ValueError as `window_attention`, and on shapes and dtypes of these four that do not fit.
    """
    _check(q, k, v, begin, end, softmax_scale)
    _check_upstream(grad_out, gate, delta, softmax_lse, q, v)
    begin, end = begin.contiguous(), end.contiguous()
    return window_gradients(
        grad_out, gate, delta, softmax_lse, q, k, v, begin, end, softmax_scale, kv_dtype, aligned=aligned
    )


def _check_upstream(
    grad_out: Tensor, gate: Tensor | None, delta: Tensor, softmax_lse: Tensor, q: Tensor, v: Tensor
) -> None:
    if grad_out.shape != (*q.shape[:2], v.shape[2]) or grad_out.dtype != q.dtype:
        raise ValueError(
            f"grad_out is {grad_out.dtype} {tuple(grad_out.shape)}, but the gradient of the output of q {q.dtype} "
            f"{tuple(q.shape)} and v {tuple(v.shape)} is {q.dtype} {(*q.shape[:2], v.shape[2])}, because it is "
            f"multiplied with them on the tensor cores; reshape or cast it"
        )
    statistics = {"delta": delta, "softmax_lse": softmax_lse}
    fits = all(x.shape == q.shape[:2] and x.dtype == torch.float32 for x in statistics.values())
    if not fits or (gate is not None and gate.shape != q.shape[:2]):
        given = ", ".join(
            f"{name} {x.dtype} {tuple(x.shape)}" for name, x in {"gate": gate, **statistics}.items() if x is not None
        )
        raise ValueError(
            f"{given}: each must be [T, Hq] = {tuple(q.shape[:2])}, delta and softmax_lse fp32, because a row of "
            f"scores has one of each and exponentials of their differences are taken; pass a column of gate_deltas, "
            f"softmax_lse as the forward returned it, and gates[..., b]"
        )


def _check(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, softmax_scale: float) -> None:
    if q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: the key-value heads must divide "
            f"the query heads, k and v must have the same rows and heads, q and k the same head dim"
        )
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}: the kernel needs one dtype of bf16, fp16 or fp32, "
            f"because the tensor cores take one; cast them, or use nsa_kernels.reference for fp64"
        )
    for name, bound in (("begin", begin), ("end", end)):
        if bound.shape != q.shape[:1] or bound.dtype != torch.int32:
            raise ValueError(
                f"{name} is {bound.dtype} {tuple(bound.shape)}: the kernel reads one int32 per query, "
                f"[{q.shape[0]}]; use {name}.to(torch.int32)"
            )
    main, tail = split_head_dim(q.shape[2])
    for name, dim, fits in (
        ("Dk", q.shape[2], main >= 16 and (tail == 0 or (tail >= 16 and tail.bit_count() == 1))),
        ("Dv", v.shape[2], v.shape[2] >= 16 and v.shape[2].bit_count() == 1),
    ):
        if not fits:
            raise ValueError(
                f"{name}={dim}: tiles are powers of two of at least 16, and only Dk may be the sum of two "
                f"(192 = 128 + 64), because registers are laid out in powers of two; pad the head dim with zeros"
            )
    if not softmax_scale > 0:
        raise ValueError(
            f"softmax_scale={softmax_scale} must be positive, because the running maximum is taken before scaling; "
            f"negate q instead"
        )
