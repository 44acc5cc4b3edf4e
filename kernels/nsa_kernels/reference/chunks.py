"""Attention over chunks of queries, with a backward that runs each chunk again: what the reference is built from.

Names as in `reference`; C = queries of a chunk, K = keys that one of them sees.

A key that a query does not see has weight 0 for it, but 0 times NaN, or times infinity, is NaN. So a chunk that holds
such a number, or one so large that a product may become infinite, is taken query by query, each with the keys it sees
and no others (`apart`): what lies in padding, in another document, or after a query does not reach it, nor it them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores held at once by one chunk of queries: 2**24 fp32 numbers are 64 MiB.
MAX_SCORES = 2**24
# Sums of products of two numbers below it are finite, by the bytes of a number that is computed with.
_TAME = {4: 2.0**40, 8: 2.0**320}


class Chunk(NamedTuple):
    """Consecutive queries, the rows of k and v that some of them see, and which of those each one sees."""

    rows: slice
    keys: slice | Tensor
    visible: Callable[[], Tensor]  # -> bool [C, K]; not kept, for a long sequence's would be large


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_zeros(x: Tensor) -> Tensor:
    """Room for sums of the shape of `x`, contiguous."""
    return torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device)


def outside_autocast(x: Tensor) -> torch.autocast:
    """A block in which products are of the dtypes they are written in: autocast would make those of fp32 bf16."""
    return torch.autocast(x.device.type, enabled=False)


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
    """Attention of q [T, Hq, Dk] to rows of k, v [R, Hkv, D], chunk by chunk; without a chunk a query gets (0, -inf).

    Forward keeps nothing of a chunk; backward runs it again under autograd and adds its key gradients in place, in
    fp32 or better. So memory is one chunk's scores, and what is differentiated is the forward as it is written.
    """

    @staticmethod
    def forward(ctx, chunks: Sequence[Chunk], softmax_scale: float, q: Tensor, k: Tensor, v: Tensor):
        ctx.chunks, ctx.softmax_scale = chunks, softmax_scale
        ctx.save_for_backward(q, k, v)
        ctx.set_materialize_grads(False)
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        lse = torch.full(q.shape[:2], -math.inf, dtype=compute_dtype(q), device=q.device)
        with outside_autocast(q):
            for rows, keys, visible in apart(chunks, [q], [k, v]):
                out[rows], lse[rows] = softmax_attention(q[rows], k[keys], v[keys], visible(), softmax_scale)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v = ctx.saved_tensors

        def upstream(rows: slice, out: Tensor, lse: Tensor) -> list[Tensor | None]:
            return [None if g is None else g[rows] for g in (grad_out, grad_lse)]

        of_rows = [q, *(g for g in (grad_out, grad_lse) if g is not None)]
        dq, dk, dv = chunk_gradients(ctx.chunks, ctx.softmax_scale, upstream, of_rows, q, k, v)
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def chunk_gradients(
    chunks: Sequence[Chunk],
    softmax_scale: float,
    upstream: Callable[..., list[Tensor | None]],
    of_rows: Iterable[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> list[Tensor]:
    """dq, dk, dv in fp32 or better.

    upstream    (rows, out, lse) -> the gradients of a chunk's two results, None for none
    of_rows     all that `upstream` and a row's scores are made of, [T, ...] each
    """
    totals = [wide_zeros(x) for x in (q, k, v)]
    with outside_autocast(q):
        for rows, keys, visible in apart(chunks, of_rows, [k, v]):
            inputs = q_, k_, v_ = [x.detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
            with torch.enable_grad():
                results = softmax_attention(q_, k_, v_, visible(), softmax_scale)
            above = upstream(rows, *(y.detach() for y in results))
            pairs = [(y, g) for y, g in zip(results, above, strict=True) if g is not None]
            grads = torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
            for total, where, grad in zip(totals, (rows, keys, keys), grads, strict=True):
                if grad is not None:
                    add_at(total, where, grad)
    return totals


def add_at(total: Tensor, where: slice | Tensor, grad: Tensor) -> None:
    """`grad` on top of the rows `where` of `total`, which occur once."""
    if isinstance(where, slice):
        total[where] += grad
    else:
        total.index_add_(0, where, grad.to(total.dtype))


# --- Which keys a chunk sees -------------------------------------------------------------------------------------


def apart(chunks: Iterable[Chunk], of_rows: Iterable[Tensor], of_keys: Iterable[Tensor]) -> Iterator[Chunk]:
    """The chunks; query by query, each with its own keys only, where 0 times a number of the chunk may not be 0.

    of_rows [T, ...] and of_keys [R, ...] are all that enters the chunks' products.
    """
    wild_rows, wild_keys = _wild(of_rows), _wild(of_keys)
    if wild_rows is None and wild_keys is None:
        yield from chunks
        return
    for chunk in chunks:
        parts = ((wild_rows, chunk.rows), (wild_keys, chunk.keys))
        if any(wild is not None and bool(wild[where].any()) for wild, where in parts):
            yield from _by_query(chunk)
        else:
            yield chunk


def _by_query(chunk: Chunk) -> Iterator[Chunk]:
    visible, keys = chunk.visible(), chunk.keys
    if isinstance(keys, slice):
        keys = torch.arange(keys.start, keys.stop, device=visible.device)
    for row, seen in zip(range(chunk.rows.start, chunk.rows.stop), visible, strict=True):
        mine = keys[seen]
        if len(mine):
            yield Chunk(slice(row, row + 1), mine, partial(seen.new_ones, (1, len(mine))))


def _wild(tensors: Iterable[Tensor]) -> Tensor | None:
    """bool [T], true where a row of one of these [T, ...] is NaN, infinite or very large; None if there is none."""
    found = None
    for x in tensors:
        bound = _TAME[compute_dtype(x).itemsize]
        if x.numel() and not _is_tame(x, bound):
            wild = ~(torch.linalg.vector_norm(x.flatten(1), math.inf, 1) < bound)  # NaN is not less
            found = wild if found is None else found | wild
    return found


def _is_tame(x: Tensor, bound: float) -> bool:
    least, most = torch.aminmax(x)  # in one pass; NaN where there is NaN
    return bool((least > -bound) & (most < bound))


def interval_spans(begin: Tensor, end: Tensor, num_q_heads: int) -> list[tuple[slice, slice]]:
    """(queries, rows they span): at most 128 queries, whose scores against those rows fit in MAX_SCORES."""
    lo, hi = begin.tolist(), end.tolist()
    spans = []
    start = 0
    while start < len(lo):
        stop = min(start + 128, len(lo))
        # Both ends are non-decreasing, so the first and the last query bound the rows of a chunk.
        while stop - start > 1 and (stop - start) * (hi[stop - 1] - lo[start]) * num_q_heads > MAX_SCORES:
            stop = start + (stop - start) // 2
        spans.append((slice(start, stop), slice(lo[start], max(lo[start], hi[stop - 1]))))
        start = stop
    return spans


def interval_chunks(begin: Tensor, end: Tensor, num_q_heads: int) -> list[Chunk]:
    """Chunks of queries that see the rows `[begin[t], end[t])` each; those that see none are left out."""

    def chunk(rows: slice, keys: slice) -> Chunk:
        def visible() -> Tensor:
            row = torch.arange(keys.start, keys.stop, device=begin.device)
            return (row >= begin[rows, None]) & (row < end[rows, None])

        return Chunk(rows, keys, visible)

    return [chunk(*span) for span in interval_spans(begin, end, num_q_heads) if span[1].start < span[1].stop]


def head_pages(
    head: int, k: Tensor, v: Tensor, k_remote: Tensor | None, v_remote: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows of one head's local pages, then of all remote ones: [R + pages * l', 1, Dk], [R + pages * l', 1, Dv]."""
    local_k, local_v = (x[:, head : head + 1] for x in (k, v))
    if k_remote is None or v_remote is None:
        return local_k, local_v
    pairs = ((local_k, k_remote), (local_v, v_remote))
    rows_k, rows_v = (torch.cat([local, remote.flatten(0, 1)[:, None]]) for local, remote in pairs)
    return rows_k, rows_v


def selected_chunks(
    block_indices: Tensor, block_table: Tensor, position: Tensor, block_len: int, group: int
) -> list[Chunk]:
    """One key-value head: a chunk reads the union of its queries' blocks once.

    block_indices [T, n], block_table [num_blocks] of integers
    """
    token = torch.arange(block_len, device=position.device)

    def chunk(rows: slice, union: Tensor) -> Chunk:
        def visible() -> Tensor:
            chosen = (block_indices[rows, :, None] == union).any(1)  # [C, U]
            causal = union[:, None] * block_len + token <= position[rows, None, None]  # [C, U, l']
            return (chosen[..., None] & causal).flatten(1)

        return Chunk(rows, (block_table[union].long()[:, None] * block_len + token).flatten(), visible)

    # 64 queries that share no block at all hold 64 * n blocks; halve the chunk until that bound fits.
    step = 64
    while step > 1 and step * step * block_indices.shape[1] * block_len * group > MAX_SCORES:
        step //= 2
    chunks = []
    for start in range(0, len(block_indices), step):
        rows = slice(start, min(start + step, len(block_indices)))
        union = block_indices[rows].unique().long()
        union = union[union >= 0]  # [U] global block ids
        if len(union):
            chunks.append(chunk(rows, union))
    return chunks
