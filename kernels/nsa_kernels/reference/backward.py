"""The reference's gradients of each branch under a gate, where its keys may be a part of what a query attended to.

    y[t, h] = gate[t, h] * out[t, h],       out the softmax over all keys of the query, softmax_lse its logarithm
    P = gate * exp(s - softmax_lse)         over the keys given here
    dV = P^T dO     dS = P * (dO V^T - delta)     dQ = scale * dS K     dK = scale * dS^T Q     delta = rowsum(dO * out)

Written as what it is, a weighted sum of parts r: out = sum_r w_r out_r with w_r = exp(lse_r - softmax_lse). So the
part given here gets gate * w_r * dO, its lse gets gate * w_r * (dO . out_r - delta), and autograd does the rest.

Shapes      grad_out [T, Hq, Dv]: of y     gate [T, Hq], None for ones     delta, softmax_lse [T, Hq]: of `out`, ungated
            other arguments as in the branch's forward
Returns     gradients in the dtypes of their tensors, or all in `dtype`; sums in fp32 or better
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_kernels.reference.chunks import (
    chunk_gradients,
    compute_dtype,
    head_pages,
    interval_chunks,
    selected_chunks,
    wide_zeros,
)


@torch.no_grad()
def compressed_attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `gate * compressed_attention(q, k, v, begin, end)`, from its delta and softmax_lse.

    kv_dtype    of dk and dv; None: those of k and v
    """
    upstream, of_rows = _upstream(grad_out, gate, delta, softmax_lse)
    chunks = interval_chunks(begin, end, q.shape[1])
    dq, dk, dv = chunk_gradients(chunks, softmax_scale, upstream, [q, *of_rows], q, k, v)
    return dq.to(q.dtype), dk.to(kv_dtype or k.dtype), dv.to(kv_dtype or v.dtype)


@torch.no_grad()
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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `gate * window_attention(q, k, v, begin, end)`, from its delta and softmax_lse.

    kv_dtype    of dk and dv; None: those of k and v
    """
    return compressed_attention_backward(
        grad_out, gate, delta, softmax_lse, q, k, v, begin, end, softmax_scale=softmax_scale, kv_dtype=kv_dtype
    )


@torch.no_grad()
def selected_attention_backward(
    grad_out: Tensor,
    gate: Tensor | None,
    delta: Tensor,
    softmax_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_table: Tensor,
    position: Tensor,
    *,
    slc_block_len: int,
    softmax_scale: float,
    k_remote: Tensor | None = None,
    v_remote: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dk_remote, dv_remote of `gate * selected_attention(...)`; the last two None without remote pages.

    dtype       of all five; None: those of their tensors
    """
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (wide_zeros(x) for x in (q, k, v))
    dk_remote, dv_remote = (None if x is None else wide_zeros(x) for x in (k_remote, v_remote))
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        gate_column = None if gate is None else gate[:, heads]
        upstream, of_rows = _upstream(grad_out[:, heads], gate_column, delta[:, heads], softmax_lse[:, heads])
        pages = head_pages(head, k, v, k_remote, v_remote)
        chunks = selected_chunks(block_indices[:, head], block_table[head], position, slc_block_len, group)
        queries = q[:, heads]
        dq[:, heads], *page_grads = chunk_gradients(
            chunks, softmax_scale, upstream, [queries, *of_rows], queries, *pages
        )
        for local, remote, grad in zip((dk, dv), (dk_remote, dv_remote), page_grads, strict=True):
            local[:, head] = grad[: len(k), 0]
            if remote is not None:
                remote += grad[len(k) :, 0].unflatten(0, remote.shape[:2])
    pairs = ((dq, q), (dk, k), (dv, v), (dk_remote, k_remote), (dv_remote, v_remote))
    return tuple(None if g is None or x is None else g.to(dtype or x.dtype) for g, x in pairs)


def _upstream(
    grad_out: Tensor, gate: Tensor | None, delta: Tensor, softmax_lse: Tensor
) -> tuple[Callable[..., list[Tensor | None]], list[Tensor]]:
    """(rows, out_r, lse_r) -> gradients of a part's out_r and lse_r, see the head of this file; and what is in them."""
    dtype = compute_dtype(grad_out)

    def upstream(rows: slice, part: Tensor, part_lse: Tensor) -> list[Tensor | None]:
        seen = part_lse > -torch.inf
        weight = torch.exp((part_lse - softmax_lse[rows]).masked_fill(~seen, -torch.inf))
        if gate is not None:
            weight = weight * gate[rows].to(dtype)
        upstream_out = grad_out[rows].to(dtype)
        grad_lse = weight * ((upstream_out * part.to(dtype)).sum(-1) - delta[rows])
        return [(weight[..., None] * upstream_out).to(part.dtype), grad_lse]

    lse = softmax_lse.masked_fill(softmax_lse == -torch.inf, 0)  # of rows without keys, which is no wild number
    return upstream, [grad_out, delta, lse, *([] if gate is None else [gate])]
