"""The gradients of a branch under a gate, where its keys may be a part of what a query attended to.

    y[t, h] = gate[t, h] * out[t, h],       out the softmax over all keys of the query, softmax_lse its logarithm
    P = gate * exp(s - softmax_lse)         over the keys given here
    dV = P^T dO     dS = P * (dO V^T - delta)     dQ = scale * dS K     dK = scale * dS^T Q     delta = rowsum(dO * out)

Written as what it is, a weighted sum of parts r: out = sum_r w_r out_r with w_r = exp(lse_r - softmax_lse). So the
part given here gets gate * w_r * dO, its lse gets gate * w_r * (dO . out_r - delta), and autograd does the rest.

Shapes      `contracts.Upstream`: grad_out [T, Hq, Dv] of y; gate [T, Hq], None for ones; delta, softmax_lse [T, Hq] of
            `out`, ungated
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_kernels.contracts import Upstream
from nsa_kernels.reference.chunks import compute_dtype


def gradients_of_parts(upstream: Upstream) -> tuple[Callable[..., list[Tensor | None]], list[Tensor]]:
    """(rows, out_r, lse_r) -> gradients of a part's out_r and lse_r, see the head of this file; and what is in them."""
    grad_out, gate, delta, softmax_lse = upstream
    dtype = compute_dtype(grad_out)

    def of_part(rows: slice, part: Tensor, part_lse: Tensor) -> list[Tensor | None]:
        seen = part_lse > -torch.inf
        weight = torch.exp((part_lse - softmax_lse[rows]).masked_fill(~seen, -torch.inf))
        if gate is not None:
            weight = weight * gate[rows].to(dtype)
        upstream_out = grad_out[rows].to(dtype)
        grad_lse = weight * ((upstream_out * part.to(dtype)).sum(-1) - delta[rows])
        return [(weight[..., None] * upstream_out).to(part.dtype), grad_lse]

    lse = softmax_lse.masked_fill(softmax_lse == -torch.inf, 0)  # of rows without keys, which is no wild number
    return of_part, [grad_out, delta, lse, *([] if gate is None else [gate])]
