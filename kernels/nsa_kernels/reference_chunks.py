"""Attention over chunks of queries, with a backward that runs each chunk again: what the reference is built from."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float):
    """softmax(q k^T) v under a mask: q [C, Hq, Dk], k [K, Hkv, Dk], v [K, Hkv, Dv], visible [C, K]."""
    num_rows, num_q_heads = q.shape[:2]
    num_kv_heads = k.shape[1]
    dtype = compute_dtype(q)
    grouped = (q.to(dtype) * softmax_scale).unflatten(1, (num_kv_heads, num_q_heads // num_kv_heads))
    grouped = grouped.permute(1, 0, 2, 3).flatten(1, 2)  # [Hkv, C * G, Dk]
    scores = torch.bmm(grouped, k.to(dtype).permute(1, 2, 0))  # [Hkv, C * G, K]
    scores = scores.unflatten(1, (num_rows, -1)).masked_fill(~visible[:, None], -math.inf)  # [Hkv, C, G, K]
    # softmax does not depend on the offset; a row that sees no key has none and takes 0.
    offset = scores.detach().amax(-1, keepdim=True)
    weight = torch.exp(scores - offset.masked_fill(offset == -math.inf, 0.0))
    total = weight.sum(-1, keepdim=True)  # at least 1, or 0 where there is no key
    safe_total = total.masked_fill(total == 0, 1.0)
    lse = (offset + safe_total.log()).squeeze(-1)  # [Hkv, C, G], -inf + 0 without keys
    out = torch.bmm(weight.flatten(1, 2), v.to(dtype).transpose(0, 1)).unflatten(1, (num_rows, -1)) / safe_total
    return out.transpose(0, 1).flatten(1, 2).to(q.dtype), lse.transpose(0, 1).flatten(1)


class QueryChunks(torch.autograd.Function):
    """Apply `attend(rows, keys, q[rows], k[keys], v[keys]) -> (out, lse)` chunk by chunk; no chunk is without keys.

    Queries of no chunk see nothing: (0, -inf).

    Forward keeps nothing of a chunk; backward runs it again under autograd and adds its key gradients in place, in
    fp32 or better. So memory is one chunk's scores, and what is differentiated is the forward as it is written.
    """

    @staticmethod
    def forward(
        ctx,
        attend: Callable[..., tuple[Tensor, Tensor]],
        chunks: Sequence[tuple[slice, slice | Tensor]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ):
        ctx.attend, ctx.chunks = attend, chunks
        ctx.save_for_backward(q, k, v)
        ctx.set_materialize_grads(False)
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        lse = torch.full(q.shape[:2], -math.inf, dtype=compute_dtype(q), device=q.device)
        for rows, keys in chunks:
            out[rows], lse[rows] = attend(rows, keys, q[rows], k[keys], v[keys])
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v = ctx.saved_tensors

        def upstream(rows: slice, out: Tensor, lse: Tensor) -> list[Tensor | None]:
            return [None if g is None else g[rows] for g in (grad_out, grad_lse)]

        dq, dk, dv = chunk_gradients(ctx.attend, ctx.chunks, upstream, q, k, v)
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def chunk_gradients(attend, chunks, upstream, q, k, v) -> list[Tensor]:
    """dq, dk, dv in fp32 or better; `upstream(rows, out, lse)` gives the gradients of a chunk's two results."""
    totals = [torch.zeros_like(x, dtype=compute_dtype(x)) for x in (q, k, v)]
    for rows, keys in chunks:
        inputs = [x.detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
        with torch.enable_grad():
            results = attend(rows, keys, *inputs)
        pairs = [
            (y, g)
            for y, g in zip(results, upstream(rows, *(y.detach() for y in results)), strict=True)
            if g is not None
        ]
        grads = torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        for total, where, grad in zip(totals, (rows, keys, keys), grads, strict=True):
            if grad is None:
                continue
            if isinstance(where, slice):
                total[where] += grad
            else:
                total.index_add_(0, where, grad.to(total.dtype))
    return totals
