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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.common.limits import KERNEL_DTYPES
from nsa_kernels.common.rows import unit_stride
from nsa_kernels.phi.mean import CompressMean
from nsa_kernels.phi.mlp import mlp_backward, mlp_forward

Body = Callable[[list[Tensor]], Sequence[Tensor]]
Run = Callable[[str, Body, list[Tensor]], Sequence[Tensor]]  # (part, body, inputs) -> body(inputs)


class _CompressMLP(torch.autograd.Function):
    """`tensors` are x, pos_emb, w1, w2 of one tensor, or each of both, in the same order."""

    @staticmethod
    def forward(ctx, run, block_rows, *tensors):
        num = len(tensors) // 4

        def body(inputs: list[Tensor]) -> tuple[Tensor, ...]:
            block_rows, *tensors = inputs
            xs, pos_embs, w1s, w2s = _in_turn(tensors, num)
            y, pre, hidden = mlp_forward(xs, block_rows, pos_embs, w1s, w2s)
            return *y, pre, hidden

        *ys, pre, hidden = run("phi", body, [block_rows, *tensors])
        ctx.num, ctx.run = num, run
        ctx.save_for_backward(block_rows, pre, hidden, *tensors)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_ys):
        grad_ys = tuple(unit_stride(t) for t in grad_ys)
        if grad_ys[0].stride() != grad_ys[-1].stride():
            grad_ys = tuple(t.contiguous() for t in grad_ys)
        num = ctx.num

        def body(inputs: list[Tensor]) -> list[Tensor]:
            block_rows, pre, hidden, *tensors = inputs
            grad_ys, xs, pos_embs, w1s, w2s = _in_turn(tensors, num)
            grads = mlp_backward(grad_ys, xs, block_rows, pos_embs, w1s, w2s, pre, hidden)
            return [grad for of_both in grads for grad in of_both]

        block_rows, pre, hidden, *tensors = ctx.saved_tensors
        grads = ctx.run("phi backward", body, [block_rows, pre, hidden, *grad_ys, *tensors])
        return None, None, *grads


def _run(part: str, body: Body, inputs: list[Tensor]) -> Sequence[Tensor]:
    return body(inputs)


def _in_turn(tensors: Sequence[Tensor], num: int) -> list[Sequence[Tensor]]:
    return [tensors[i : i + num] for i in range(0, len(tensors), num)]


def compress_mean(x: Tensor, block_rows: Tensor, block_len: int) -> Tensor:
    """The parameter-free phi: the mean of every block of `x` [R, Hkv, D], as [M, Hkv, D]."""
    _check_dtype(x)
    return CompressMean.apply(x, block_rows.contiguous(), block_len)


def compress_mlp(x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The learnable phi (eq. 7): an MLP over the concatenated block, its intra-block position embedding added first.

    x           [R, Hkv, D]         block i is rows block_rows[i] .. block_rows[i] + l
    pos_emb     [Hkv, l, D]         w1 [Hkv, l * D, F]        w2 [Hkv, F, D]
    returns     [M, Hkv, D]         dtype of x
    raises ValueError on shapes and dtypes that do not fit together
    """
    return _CompressMLP.apply(_run, block_rows.contiguous(), *mlp_tensors(x, pos_emb, w1, w2))[0]


def compress_mlp_pair(
    k: Tensor,
    v: Tensor,
    block_rows: Tensor,
    phi_k: tuple[Tensor, ...],
    phi_v: tuple[Tensor, ...],
    *,
    run: Run = _run,
) -> tuple[Tensor, Tensor]:
    """`compress_mlp` of k and of v, each phi its (pos_emb, w1, w2): the same bits, in half the launches.

    That is where k and v, and their phis, have the same shapes and strides; else it is one after the other.

    run         an option of these kernels: runs the parts "phi" and "phi backward", as from their tapes (`common.tape`)
    """
    pairs = list(zip(mlp_tensors(k, *phi_k), mlp_tensors(v, *phi_v), strict=True))
    block_rows = block_rows.contiguous()
    if all((a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) for a, b in pairs):
        return _CompressMLP.apply(run, block_rows, *(t for pair in pairs for t in pair))
    k, v = (_CompressMLP.apply(run, block_rows, *tensors)[0] for tensors in zip(*pairs, strict=True))
    return k, v


def mlp_tensors(x: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
