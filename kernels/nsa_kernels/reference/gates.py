"""Putting branches, their gradients and partial results together."""

import math

import torch
from torch import Tensor

from nsa_kernels.reference.chunks import compute_dtype


def combine(gates: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`sum_b gate_b * out_b` (eq. 5). gates [T, Hq, 3] in the order cmp, slc, win; out_* [T, Hq, Dv].

    out         [T, Hq, Dv] of any strides, filled and returned, outside of autograd; None: a new tensor
    """
    dtype = compute_dtype(out_cmp)
    weighted = [gates[..., b, None].to(dtype) * x.to(dtype) for b, x in enumerate((out_cmp, out_slc, out_win))]
    return _result((weighted[0] + weighted[1] + weighted[2]).to(out_cmp.dtype), out)


@torch.no_grad()
def sum_branches(cmp: Tensor, slc: Tensor, win: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`cmp + slc + win`, rounded once to the dtype of `cmp`: the three branches' gradients of q, [T, Hq, Dk].

    Each may have a dtype of its own. out: as in `combine`.
    """
    dtype = compute_dtype(cmp)
    return _result((cmp.to(dtype) + slc.to(dtype) + win.to(dtype)).to(cmp.dtype), out)


@torch.no_grad()
def gate_deltas(
    grad_out: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """`deltas[t, h, b] = sum_d grad_out[t, h, d] * out_b[t, h, d]`: [T, Hq, 3], fp32 or better.

    The gradient of the gates, where grad_out is that of `combine`, and the `delta` of each branch's backward, where
    what the gate multiplies is found again from softmax_lse. out: as in `combine`, [T, Hq, 3].
    """
    dtype = compute_dtype(grad_out)
    deltas = [(grad_out.to(dtype) * x.to(dtype)).sum(-1) for x in (out_cmp, out_slc, out_win)]
    return _result(torch.stack(deltas, -1), out)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys: out_* [T, Hq, Dv], lse_* [T, Hq] (arXiv:1805.02867, 3.1).

    A row that saw no key is (0, -inf) on its side; where neither side saw one the result is (0, -inf) again.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # exp(-inf - -inf) is NaN, in the gradient too: subtract 0 on rows without keys.
    base = lse.masked_fill(lse == -math.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - base)[..., None], torch.exp(lse_b - base)[..., None]
    dtype = compute_dtype(out_a)
    return (weight_a * out_a.to(dtype) + weight_b * out_b.to(dtype)).to(out_a.dtype), lse


def _result(value: Tensor, out: Tensor | None) -> Tensor:
    return value if out is None else out.detach().copy_(value)
