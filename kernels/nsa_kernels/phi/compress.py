"""The compression phi (section 3.3.1, eq. 7): every block of l rows becomes one row, by their mean or by an MLP.

    compress_mean   y[i, h] = mean over o < l of x[block_rows[i] + o, h]
    compress_mlp    y[i, h] = gelu(vec(x[block i, h] + pos_emb[h]) @ w1[h]) @ w2[h]       gelu in its tanh form

Blocks overlap (l = 32 rows, starts d = 16 apart), but nothing here is told d: rows are gathered where they lie, so
starts may be anywhere, in any order. A gradient goes back to row r from each block that covers it, which blocks sorted
by their start answer with one search; every row is written once, by one program, so no atomics.

Shapes      R = key rows here, M = blocks, l = block length, F = hidden width
    x       [R, Hkv, D]     bf16, fp16 or fp32, any strides over R and Hkv      block_rows int32 or int64 [M]
    pos_emb [Hkv, l, D]     w1 [Hkv, l * D, F]      w2 [Hkv, F, D]      cast to the dtype of x where they differ
    returns [M, Hkv, D]     dtype of x
Numerics    fp32 accumulation; hidden values enter the second product in the dtype of x; the result is rounded once
Reference   nsa_kernels.reference.compress_mean, compress_mlp, compress_mlp_pair
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.common.rows import unit_stride
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.common.tiles import KERNEL_DTYPES
from nsa_kernels.phi.mlp import mlp_backward, mlp_forward

BLOCK_ROWS = 32  # of the kernels of the mean, which only move bytes


@triton.jit
def _mean_kernel(
    x_ptr, block_rows_ptr,
    y_ptr,
    num_blocks, block_len, stride_xt, stride_xh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, D_PAD)[None, :]
    start = tl.load(block_rows_ptr + block, mask=block < num_blocks, other=0).to(tl.int64)[:, None]
    mask = (block < num_blocks)[:, None] & (dim < D)
    total = tl.zeros([BLOCK, D_PAD], tl.float32)
    for offset in tl.range(0, block_len):
        row = x_ptr + (start + offset) * stride_xt + head.to(tl.int64) * stride_xh
        total += tl.load(row + dim, mask=mask, other=0.0).to(tl.float32)
    y = y_ptr + (block.to(tl.int64) * tl.num_programs(1) + head)[:, None] * D
    tl.store(y + dim, (total / block_len).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mean_backward_kernel(
    grad_y_ptr, order_ptr, first_ptr, last_ptr,
    grad_x_ptr,
    num_rows, block_len, stride_yt, stride_yh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r takes from blocks order[first[r]] .. order[last[r] - 1], those that cover it, in that order."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, D_PAD)[None, :]
    first = tl.load(first_ptr + row, mask=row < num_rows, other=0)
    last = tl.load(last_ptr + row, mask=row < num_rows, other=0)
    total = tl.zeros([BLOCK, D_PAD], tl.float32)
    for step in tl.range(0, tl.max(last - first)):
        covers = first + step < last
        block = tl.load(order_ptr + first + step, mask=covers, other=0).to(tl.int64)[:, None]
        grad_y = grad_y_ptr + block * stride_yt + head.to(tl.int64) * stride_yh
        total += tl.load(grad_y + dim, mask=covers[:, None] & (dim < D), other=0.0).to(tl.float32)
    grad_x = grad_x_ptr + (row.to(tl.int64) * tl.num_programs(1) + head)[:, None] * D
    mask = (row < num_rows)[:, None] & (dim < D)
    tl.store(grad_x + dim, (total / block_len).to(grad_x_ptr.dtype.element_ty), mask=mask)


class _CompressMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block_rows, block_len):
        x = unit_stride(x)
        ctx.save_for_backward(block_rows)
        ctx.num_rows, ctx.block_len = x.shape[0], block_len
        num_heads, head_dim = x.shape[1:]
        num_blocks = block_rows.shape[0]
        y = x.new_empty(num_blocks, num_heads, head_dim)
        if y.numel():
            _mean_kernel[(cdiv(num_blocks, BLOCK_ROWS), num_heads)](
                x, block_rows,
                y,
                num_blocks, block_len, *x.stride()[:2],
                D=head_dim, D_PAD=next_power_of_2(head_dim), BLOCK=BLOCK_ROWS,
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (block_rows,) = ctx.saved_tensors
        grad_y = unit_stride(grad_y)
        num_heads, head_dim = grad_y.shape[1:]
        grad_x = grad_y.new_empty(ctx.num_rows, num_heads, head_dim)
        if grad_x.numel() == 0 or grad_y.numel() == 0:
            return grad_x.zero_(), None, None
        starts, order = torch.sort(block_rows)
        # Row r is covered by the blocks that start in (r - l, r].
        row = torch.arange(ctx.num_rows, dtype=starts.dtype, device=starts.device)
        first = torch.searchsorted(starts, row - ctx.block_len, right=True, out_int32=True)
        last = torch.searchsorted(starts, row, right=True, out_int32=True)
        _mean_backward_kernel[(cdiv(ctx.num_rows, BLOCK_ROWS), num_heads)](
            grad_y, order, first, last,
            grad_x,
            ctx.num_rows, ctx.block_len, *grad_y.stride()[:2],
            D=head_dim, D_PAD=next_power_of_2(head_dim), BLOCK=BLOCK_ROWS,
        )  # fmt: skip
        return grad_x, None, None


class _CompressMLP(torch.autograd.Function):
    """`tensors` are x, pos_emb, w1, w2 of one tensor, or each of both, in the same order."""

    @staticmethod
    def forward(ctx, block_rows, *tensors):
        ctx.num = len(tensors) // 4
        xs, pos_embs, w1s, w2s = _in_turn(tensors, ctx.num)
        y, pre, hidden = mlp_forward(xs, block_rows, pos_embs, w1s, w2s)
        ctx.save_for_backward(block_rows, pre, hidden, *tensors)
        return tuple(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_ys):
        block_rows, pre, hidden, *tensors = ctx.saved_tensors
        xs, pos_embs, w1s, w2s = _in_turn(tensors, ctx.num)
        grad_ys = tuple(unit_stride(t) for t in grad_ys)
        if grad_ys[0].stride() != grad_ys[-1].stride():
            grad_ys = tuple(t.contiguous() for t in grad_ys)
        grads = mlp_backward(grad_ys, xs, block_rows, pos_embs, w1s, w2s, pre, hidden)
        return None, *(grad for of_both in grads for grad in of_both)


def _in_turn(tensors: Sequence[Tensor], num: int) -> list[Sequence[Tensor]]:
    return [tensors[i : i + num] for i in range(0, len(tensors), num)]


def compress_mean(x: Tensor, block_rows: Tensor, block_len: int) -> Tensor:
    """The parameter-free phi: the mean of every block of `x` [R, Hkv, D], as [M, Hkv, D]."""
    _check_dtype(x)
    return _CompressMean.apply(x, block_rows.contiguous(), block_len)


def compress_mlp(x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The learnable phi (eq. 7): an MLP over the concatenated block, its intra-block position embedding added first.

    x           [R, Hkv, D]         block i is rows block_rows[i] .. block_rows[i] + l
    pos_emb     [Hkv, l, D]         w1 [Hkv, l * D, F]        w2 [Hkv, F, D]
    returns     [M, Hkv, D]         dtype of x
    raises ValueError on shapes and dtypes that do not fit together
    """
    return _CompressMLP.apply(block_rows.contiguous(), *_mlp_tensors(x, pos_emb, w1, w2))[0]


def compress_mlp_pair(
    k: Tensor, v: Tensor, block_rows: Tensor, phi_k: tuple[Tensor, ...], phi_v: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """`compress_mlp` of k and of v, each phi its (pos_emb, w1, w2): the same bits, in half the launches.

    That is where k and v, and their phis, have the same shapes and strides; else it is one after the other.
    """
    pairs = list(zip(_mlp_tensors(k, *phi_k), _mlp_tensors(v, *phi_v), strict=True))
    if all((a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) for a, b in pairs):
        return _CompressMLP.apply(block_rows.contiguous(), *(t for pair in pairs for t in pair))
    return compress_mlp(k, block_rows, *phi_k), compress_mlp(v, block_rows, *phi_v)


def _mlp_tensors(x: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels take; ValueError if they cannot."""
    _check_dtype(x)
    num_heads, head_dim = x.shape[1:]
    fits = pos_emb.ndim == w1.ndim == w2.ndim == 3 and pos_emb.shape[::2] == (num_heads, head_dim)
    width = w1.shape[-1]
    if not fits or w1.shape[:2] != (num_heads, pos_emb[0].numel()) or w2.shape != (num_heads, width, head_dim):
        raise ValueError(
            f"pos_emb {tuple(pos_emb.shape)}, w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)} do not fit x with {num_heads} "
            f"heads of {head_dim}: they must be [Hkv, l, D], [Hkv, l * D, F] and [Hkv, F, D], an MLP for each head; "
            f"expand a shared one over the heads"
        )
    if head_dim % 16:
        raise ValueError(
            f"head_dim={head_dim} must be a multiple of 16, for tensor cores take 16 numbers at once; pad it with zeros"
        )
    pos_emb, w1, w2 = (p.to(x.dtype).contiguous() for p in (pos_emb, w1, w2))
    return unit_stride(x), pos_emb, w1, w2


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"x is {x.dtype}; the kernels take bfloat16, float16 or float32, the dtypes of the tensor cores; cast it, "
            f"or use nsa_kernels.reference"
        )
