"""Merge attention over two disjoint sets of keys into attention over both, differentiably.

    lse = logaddexp(lse_a, lse_b)        w_a = exp(lse_a - lse)        w_b = exp(lse_b - lse) = 1 - w_a
    out = w_a * out_a + w_b * out_b
    d out_a = w_a * d out        d lse_a = w_a * d lse + w_a * w_b * <d out, out_a - out_b>        and so for b

A row that saw no key is (0, -inf) on its side and has w = 0; where neither side saw one, the result is (0, -inf) again
and every gradient is 0.

Shapes      out_a, out_b, out [T, Hq, Dv] of one dtype of bf16, fp16 or fp32    lse_* [T, Hq] fp32, natural log
Strides     any over tokens and heads; out_* and d out are copied where their last stride is not 1, lse_* where they
            are not contiguous
Numerics    fp32; each result is rounded once.
Reference   nsa_kernels.reference.merge
Source      Milakov & Gimelshein 2018, arXiv:1805.02867, section 3.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.rows import row_blocks, token_head_strides, unit_stride


@triton.jit
def _weights(lse_a, lse_b):
    """w_a, w_b and the merged lse of each row, without NaN where a side is -inf."""
    larger = tl.maximum(lse_a, lse_b)
    base = tl.where(larger == float("-inf"), 0.0, larger)
    a, b = tl.exp(lse_a - base), tl.exp(lse_b - base)
    total = a + b  # at least 1 where any key was seen
    divisor = tl.where(total == 0.0, 1.0, total)
    return a / divisor, b / divisor, base + tl.log(total)


@triton.jit
def _rows(x_ptr, row, stride_t, stride_h, num_heads, mask, dim):
    """Rows [BLOCK_M, BLOCK_D] in fp32."""
    x = x_ptr + (row // num_heads) * stride_t + (row % num_heads) * stride_h
    return tl.load(x[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)


@launchable
@triton.jit
def _forward_kernel(
    a_ptr,
    lse_a_ptr,
    b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    stride_at,
    stride_ah,
    stride_bt,
    stride_bh,
    num_rows,
    num_heads,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """`out` and `lse`, contiguous, of BLOCK_M (token, head) rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    inside = row < num_rows
    mask = inside[:, None] & (dim < DIM)[None, :]
    lse_a = tl.load(lse_a_ptr + row, mask=inside, other=0.0)
    lse_b = tl.load(lse_b_ptr + row, mask=inside, other=0.0)
    w_a, w_b, lse = _weights(lse_a, lse_b)
    a = _rows(a_ptr, row, stride_at, stride_ah, num_heads, mask, dim)
    b = _rows(b_ptr, row, stride_bt, stride_bh, num_heads, mask, dim)
    out = w_a[:, None] * a + w_b[:, None] * b
    tl.store(out_ptr + row[:, None] * DIM + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, lse, mask=inside)


@launchable
@triton.jit
def _backward_kernel(
    a_ptr,
    lse_a_ptr,
    b_ptr,
    lse_b_ptr,
    grad_out_ptr,
    grad_lse_ptr,
    grad_a_ptr,
    grad_lse_a_ptr,
    grad_b_ptr,
    grad_lse_b_ptr,
    stride_at,
    stride_ah,
    stride_bt,
    stride_bh,
    stride_dt,
    stride_dh,
    num_rows,
    num_heads,
    HAS_GRAD_LSE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The four gradients, contiguous, of BLOCK_M (token, head) rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    inside = row < num_rows
    mask = inside[:, None] & (dim < DIM)[None, :]
    lse_a = tl.load(lse_a_ptr + row, mask=inside, other=0.0)
    lse_b = tl.load(lse_b_ptr + row, mask=inside, other=0.0)
    w_a, w_b, _ = _weights(lse_a, lse_b)
    a = _rows(a_ptr, row, stride_at, stride_ah, num_heads, mask, dim)
    b = _rows(b_ptr, row, stride_bt, stride_bh, num_heads, mask, dim)
    grad_out = _rows(grad_out_ptr, row, stride_dt, stride_dh, num_heads, mask, dim)
    where = row[:, None] * DIM + dim[None, :]
    tl.store(grad_a_ptr + where, (w_a[:, None] * grad_out).to(grad_a_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_b_ptr + where, (w_b[:, None] * grad_out).to(grad_b_ptr.dtype.element_ty), mask=mask)
    shared = w_a * w_b * tl.sum(grad_out * (a - b), 1)
    grad_a, grad_b = shared, -shared
    if HAS_GRAD_LSE:
        grad_lse = tl.load(grad_lse_ptr + row, mask=inside, other=0.0)
        grad_a += w_a * grad_lse
        grad_b += w_b * grad_lse
    tl.store(grad_lse_a_ptr + row, grad_a, mask=inside)
    tl.store(grad_lse_b_ptr + row, grad_b, mask=inside)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_a, lse_a, out_b, lse_b):
        out_a, out_b = unit_stride(out_a), unit_stride(out_b)
        lse_a, lse_b = lse_a.contiguous(), lse_b.contiguous()
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b)
        ctx.set_materialize_grads(False)
        out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
        lse = torch.empty_like(lse_a)
        if out.numel():
            grid, dims = row_blocks(out)
            strides = token_head_strides(out_a, out_b)
            sizes = (lse.numel(), lse.shape[1])
            _forward_kernel[grid](out_a, lse_a, out_b, lse_b, out, lse, *strides, *sizes, **dims)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        saved = out_a, lse_a, out_b, _ = ctx.saved_tensors
        grad_out = torch.zeros_like(out_a) if grad_out is None else unit_stride(grad_out)
        grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in saved)
        if grad_out.numel():
            grid, dims = row_blocks(grad_out)
            strides = token_head_strides(out_a, out_b, grad_out)
            _backward_kernel[grid](
                *(*saved, grad_out, None if grad_lse is None else grad_lse.contiguous()),
                *grads,
                *(*strides, lse_a.numel(), lse_a.shape[1]),
                HAS_GRAD_LSE=grad_lse is not None,
                **dims,
            )
        return grads


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys merged: out_* [T, Hq, Dv], lse_* [T, Hq] fp32 -> (out, softmax_lse)."""
    if out_a.shape != out_b.shape or not (lse_a.shape == lse_b.shape == out_a.shape[:2]):
        raise ValueError(
            f"out {tuple(out_a.shape)} and {tuple(out_b.shape)}, lse {tuple(lse_a.shape)} and {tuple(lse_b.shape)} do "
            f"not fit: out must be [T, Hq, Dv] and lse [T, Hq] on both sides, because rows are merged one by one; "
            f"reshape them"
        )
    if out_a.dtype != out_b.dtype or out_a.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"out of {out_a.dtype} and {out_b.dtype}: the kernel needs one dtype of bf16, fp16 or fp32, because it "
            f"computes in fp32; cast, or use nsa_kernels.reference for fp64"
        )
    if not (lse_a.dtype == lse_b.dtype == torch.float32):
        raise ValueError(
            f"lse of {lse_a.dtype} and {lse_b.dtype}: the kernel needs fp32, because weights are exponentials of their "
            f"differences; pass softmax_lse as the attention kernels return it"
        )
    return _Merge.apply(out_a, lse_a, out_b, lse_b)
