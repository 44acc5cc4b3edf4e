"""Compression (section 3.3.1, eq. 7)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.reference.chunks import compute_dtype, outside_autocast


def gather_blocks(x: Tensor, block_rows: Tensor, block_len: int) -> Tensor:
    """Rows `block_rows[i] .. block_rows[i] + block_len` of `x` [R, Hkv, D], as [M, block_len, Hkv, D]."""
    rows = block_rows.long()[:, None] + torch.arange(block_len, device=x.device)
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def compress_mean(x: Tensor, block_rows: Tensor, block_len: int) -> Tensor:
    """The parameter-free phi: the mean of every block of `x` [R, Hkv, D], as [M, Hkv, D]."""
    blocks = gather_blocks(x, block_rows, block_len)
    return blocks.to(compute_dtype(x)).mean(1).to(x.dtype)


def compress_mlp(x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The learnable phi (eq. 7): an MLP over the concatenated block, its intra-block position embedding added first.

        y[i, h] = gelu(vec(x[block i, h] + pos_emb[h]) @ w1[h]) @ w2[h]        gelu in its tanh form

    x           [R, Hkv, D]         block i is rows block_rows[i] .. block_rows[i] + l
    pos_emb     [Hkv, l, D]         w1 [Hkv, l * D, F]        w2 [Hkv, F, D]
    returns     [M, Hkv, D]         dtype of x
    """
    return _Recomputed.apply(_mlp, x, block_rows, pos_emb, w1, w2)


def _mlp(x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    block_len = pos_emb.shape[1]
    dtype = compute_dtype(x)
    blocks = gather_blocks(x, block_rows, block_len).to(dtype)  # [M, l, Hkv, D]
    flat = (blocks.transpose(1, 2) + pos_emb.to(dtype)).flatten(2)  # [M, Hkv, l * D]
    hidden = F.gelu(torch.bmm(flat.transpose(0, 1), w1.to(dtype)), approximate="tanh")  # [Hkv, M, F]
    return torch.bmm(hidden, w2.to(dtype)).transpose(0, 1).to(x.dtype)


class _Recomputed(torch.autograd.Function):
    """A function of tensors that backward runs again: its products stay fp32 or better under autocast, both times."""

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], *tensors: Tensor):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with outside_autocast(tensors[0]):
            return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        wanted = ctx.needs_input_grad[1:]
        with outside_autocast(grad), torch.enable_grad():
            inputs = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
            y = ctx.function(*inputs)
            grads = iter(torch.autograd.grad(y, [x for x in inputs if x.requires_grad], grad))
        return None, *(next(grads) if w else None for w in wanted)


def compress_mlp_pair(
    k: Tensor, v: Tensor, block_rows: Tensor, phi_k: tuple[Tensor, ...], phi_v: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """`compress_mlp` of k and of v, each phi its (pos_emb, w1, w2)."""
    return compress_mlp(k, block_rows, *phi_k), compress_mlp(v, block_rows, *phi_v)
