"""Attention over chunks of queries, with a backward that runs each chunk again: what the reference is built from.

Names as in `reference`; C = queries of a chunk, K = keys that they may see.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores held at once by one chunk of queries: 2**24 fp32 numbers are 64 MiB.
MAX_SCORES = 2**24

# attend(rows, keys, q[rows], k[keys], v[keys]) -> (out, softmax_lse) of a chunk, and (rows, keys) of each chunk
Attend = Callable[..., tuple[Tensor, Tensor]]
Chunks = Sequence[tuple[slice, slice | Tensor]]


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
        attend: Attend,
        chunks: Chunks,
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


def chunk_gradients(
    attend: Attend, chunks: Chunks, upstream: Callable[..., list[Tensor | None]], q: Tensor, k: Tensor, v: Tensor
) -> list[Tensor]:
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


# --- Which keys a chunk sees -------------------------------------------------------------------------------------


def interval_chunks(begin: Tensor, end: Tensor, num_q_heads: int) -> list[tuple[slice, slice]]:
    """(queries, rows they span): at most 128 queries, whose scores against those rows fit in MAX_SCORES."""
    lo, hi = begin.tolist(), end.tolist()
    chunks = []
    start = 0
    while start < len(lo):
        stop = min(start + 128, len(lo))
        # Both ends are non-decreasing, so the first and the last query bound the rows of a chunk.
        while stop - start > 1 and (stop - start) * (hi[stop - 1] - lo[start]) * num_q_heads > MAX_SCORES:
            stop = start + (stop - start) // 2
        chunks.append((slice(start, stop), slice(lo[start], max(lo[start], hi[stop - 1]))))
        start = stop
    return chunks


def interval_attention(begin: Tensor, end: Tensor, num_q_heads: int, softmax_scale: float) -> tuple[Attend, Chunks]:
    """Attention of query t to rows `[begin[t], end[t])`; chunks that see none are left out."""

    def attend(rows: slice, keys: slice, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        row = torch.arange(keys.start, keys.stop, device=q.device)
        visible = (row >= begin[rows, None]) & (row < end[rows, None])  # [C, K]
        return softmax_attention(q, k, v, visible, softmax_scale)

    return attend, [c for c in interval_chunks(begin, end, num_q_heads) if c[1].start < c[1].stop]


def head_pages(
    head: int, k: Tensor, v: Tensor, k_remote: Tensor | None, v_remote: Tensor | None, block_len: int
) -> list[Tensor]:
    """One head's local pages, then all remote ones: [pages, l', Dk], [pages, l', Dv]."""
    pages = [x[:, head].unflatten(0, (-1, block_len)) for x in (k, v)]
    if k_remote is None or v_remote is None:
        return pages
    return [torch.cat([local, remote]) for local, remote in zip(pages, (k_remote, v_remote), strict=True)]


def selected_attention(
    block_indices: Tensor, block_table: Tensor, position: Tensor, block_len: int, group: int, softmax_scale: float
) -> tuple[Attend, Chunks]:
    """One key-value head: a chunk reads the union of its queries' blocks once, as pages [U, l', D], under a mask.

    block_indices [T, n], block_table [num_blocks], both of integers that can index
    """
    token = torch.arange(block_len, device=position.device)
    # 64 queries that share no block at all hold 64 * n blocks; halve the chunk until that bound fits.
    step = 64
    while step > 1 and step * step * block_indices.shape[1] * block_len * group > MAX_SCORES:
        step //= 2
    chunks, union_of = [], {}
    for start in range(0, len(block_indices), step):
        rows = slice(start, min(start + step, len(block_indices)))
        union = block_indices[rows].unique()
        union = union[union >= 0]
        if len(union):
            chunks.append((rows, block_table[union]))
            union_of[start] = union

    def attend(rows: slice, _: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        union = union_of[rows.start]  # [U] global block ids
        chosen = (block_indices[rows, :, None] == union).any(1)  # [C, U]
        causal = union[:, None] * block_len + token <= position[rows, None, None]  # [C, U, l']
        visible = (chosen[..., None] & causal).flatten(1)
        return softmax_attention(q, k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None], visible, softmax_scale)

    return attend, chunks
