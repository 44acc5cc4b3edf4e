"""The functions of `nsa_kernels.reference` for training on a CPU: the attention of the branches through ATen.

ATen's attention for CPUs computes scores, softmax and sum block by block in one pass, forward and backward, without
writing the scores to memory. Queries go through it in chunks, each with the keys that it can see under a mask; the G
heads of a group are more queries to the same keys. Everything else is the reference's own.

Contract    as `nsa_kernels.reference`, but no gradient passes through `softmax_lse`
Shapes      C = queries of one chunk, K = keys it may see, H = key-value heads, G = query heads of each
Numerics    bf16 and fp16 are computed in fp32 and rounded once; key gradients are added up in fp32. The order of sums
            differs from the reference's, so results agree to rounding only.
Measured    64 queries, 4 heads, 1280 keys, D = 32, fp32, forward and backward, one thread: 3.9 ms; reference 18.0 ms.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.reference import (
    combine,
    compress_mean,
    compress_mlp,
    compress_mlp_pair,
    gate_deltas,
    merge,
    select_blocks,
    sum_branches,
)
from nsa_kernels.reference_chunks import MAX_SCORES, compute_dtype

__all__ = [
    "combine",
    "compress_mean",
    "compress_mlp",
    "compress_mlp_pair",
    "compressed_attention",
    "compressed_attention_backward",
    "gate_deltas",
    "merge",
    "select_blocks",
    "selected_attention",
    "selected_attention_backward",
    "sum_branches",
    "window_attention",
    "window_attention_backward",
]


class Chunk(NamedTuple):
    """Consecutive queries, the rows (or pages) of the keys they may see, and which of them each one sees."""

    rows: slice
    keys: slice | Tensor
    visible: Callable[[], Tensor]  # -> bool [C, K]; not kept, for a long sequence's would be large


# --- Public functions -------------------------------------------------------------------------------------------


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Query t of q [T, Hq, Dk] sees rows `[begin[t], end[t])` of k, v [M, Hkv, D] -> out [T, Hq, Dv], lse [T, Hq]."""
    return _ChunkedAttention.apply(q, k, v, interval_chunks(begin, end, q.shape[1]), softmax_scale)


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
    """Arguments and results as `reference.compressed_attention_backward`."""
    upstream = Upstream.of(grad_out, gate, delta, softmax_lse)
    grads = attention_backward(upstream, q, k, v, interval_chunks(begin, end, q.shape[1]), softmax_scale)
    return grads[0].to(q.dtype), grads[1].to(kv_dtype or k.dtype), grads[2].to(kv_dtype or v.dtype)


# The same functions of their arguments: only the keys differ.
window_attention = compressed_attention
window_attention_backward = compressed_attention_backward


def selected_attention(
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
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `reference.selected_attention`."""
    group = q.shape[1] // k.shape[1]
    parts = []
    for head in range(k.shape[1]):
        pages = _head_pages(head, k, v, k_remote, v_remote, slc_block_len)
        chunks = selected_chunks(block_indices[:, head], block_table[head], position, slc_block_len, group)
        queries = q[:, head * group : (head + 1) * group]
        parts.append(_ChunkedAttention.apply(queries, *pages, chunks, softmax_scale))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


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
    """Arguments and results as `reference.selected_attention_backward`."""
    group, num_local = q.shape[1] // k.shape[1], k.shape[0] // slc_block_len
    upstream = Upstream.of(grad_out, gate, delta, softmax_lse)
    compute = compute_dtype(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=compute) for x in (q, k, v))
    dk_remote, dv_remote = (None if x is None else torch.zeros_like(x, dtype=compute) for x in (k_remote, v_remote))
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        pages = _head_pages(head, k, v, k_remote, v_remote, slc_block_len)
        chunks = selected_chunks(block_indices[:, head], block_table[head], position, slc_block_len, group)
        grads = attention_backward(upstream.of_heads(heads), q[:, heads], *pages, chunks, softmax_scale)
        dq[:, heads] = grads[0]
        for local, remote, grad in zip((dk, dv), (dk_remote, dv_remote), grads[1:], strict=True):
            local[:, head] = grad[:num_local].flatten(0, 1).squeeze(1)
            if remote is not None:
                remote += grad[num_local:].squeeze(2)
    pairs = ((dq, q), (dk, k), (dv, v), (dk_remote, k_remote), (dv_remote, v_remote))
    return tuple(None if g is None or x is None else g.to(dtype or x.dtype) for g, x in pairs)


# --- Chunks of queries ------------------------------------------------------------------------------------------


def interval_chunks(begin: Tensor, end: Tensor, num_q_heads: int) -> list[Chunk]:
    """Chunks of queries that see rows `[begin[t], end[t])` each, both non-decreasing; left out where none see any."""
    lo, hi = begin.tolist(), end.tolist()
    chunks, start = [], 0
    while start < len(lo):
        stop = min(start + 128, len(lo))
        while stop - start > 1 and (stop - start) * (hi[stop - 1] - lo[start]) * num_q_heads > MAX_SCORES:
            stop = start + (stop - start) // 2
        rows, keys = slice(start, stop), slice(min(lo[start:stop]), max(hi[start:stop]))
        if keys.stop > keys.start:

            def visible(rows: slice = rows, keys: slice = keys) -> Tensor:
                row = torch.arange(keys.start, keys.stop, device=begin.device)
                return (row >= begin[rows, None]) & (row < end[rows, None])

            chunks.append(Chunk(rows, keys, visible))
        start = stop
    return chunks


def selected_chunks(
    block_indices: Tensor, block_table: Tensor, position: Tensor, block_len: int, group: int
) -> list[Chunk]:
    """One key-value head: block_indices [T, n], block_table [num_blocks]. A chunk reads its blocks' union once."""
    step = 64
    while step > 1 and step * step * block_indices.shape[1] * block_len * group > MAX_SCORES:
        step //= 2
    token = torch.arange(block_len, device=position.device)
    chunks = []
    for start in range(0, len(block_indices), step):
        rows = slice(start, min(start + step, len(block_indices)))
        union = block_indices[rows].unique()
        union = union[union >= 0].long()  # [U] global block ids
        if len(union):

            def visible(rows: slice = rows, union: Tensor = union) -> Tensor:
                chosen = (block_indices[rows, :, None] == union).any(1)  # [C, U]
                causal = union[:, None] * block_len + token <= position[rows, None, None]  # [C, U, l']
                return (chosen[..., None] & causal).flatten(1)

            chunks.append(Chunk(rows, block_table[union].long(), visible))
    return chunks


def _head_pages(
    head: int, k: Tensor, v: Tensor, k_remote: Tensor | None, v_remote: Tensor | None, block_len: int
) -> tuple[Tensor, Tensor]:
    """One head's local pages, then all remote ones: [pages, l', 1, Dk], [pages, l', 1, Dv]."""
    pages_k, pages_v = (x[:, head : head + 1].contiguous().unflatten(0, (-1, block_len)) for x in (k, v))
    if k_remote is None or v_remote is None:
        return pages_k, pages_v
    return torch.cat([pages_k, k_remote[:, :, None]]), torch.cat([pages_v, v_remote[:, :, None]])


# --- Attention chunk by chunk -----------------------------------------------------------------------------------


class Upstream(NamedTuple):
    """What comes from above: of all the keys of a query, of which those at hand may be a part."""

    grad_out: Tensor  # [T, Hq, Dv], times the gate
    out: Tensor  # [T, Hq, Dv], of which ATen takes rowsum(grad_out * out) alone
    softmax_lse: Tensor  # [T, Hq]

    @classmethod
    def of(cls, grad_out: Tensor, gate: Tensor | None, delta: Tensor, softmax_lse: Tensor) -> "Upstream":
        """From delta [T, Hq] = rowsum(grad_out * out): `out` is one with that sum, all of it in one place of a row."""
        wide = grad_out.to(compute_dtype(grad_out))
        largest = wide.abs().argmax(-1, keepdim=True)
        divisor = wide.gather(-1, largest)
        share = torch.where(divisor == 0, 0.0, delta[..., None] / divisor)
        out = torch.zeros_like(wide).scatter_(-1, largest, share.to(wide.dtype))
        return cls(wide if gate is None else wide * gate[..., None], out, softmax_lse)

    def of_heads(self, heads: slice) -> "Upstream":
        return Upstream(*(x[:, heads] for x in self))


class _ChunkedAttention(torch.autograd.Function):
    """q [T, Hq, Dk]; k, v rows [R, H, D] or pages [pages, l', H, D]; every chunk's softmax(q k^T) v."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[Chunk], softmax_scale: float):
        ctx.chunks, ctx.softmax_scale = chunks, softmax_scale
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        lse = torch.full(q.shape[:2], -math.inf, dtype=compute_dtype(q), device=q.device)
        for rows, keys, visible in chunks:
            see = visible()
            queries, (keys_, values) = _grouped(q[rows], k.shape[-2]), _heads_first(k, v, keys)
            seen = see.any(1)[:, None]
            # A row without keys would be 0/0: let it see all, and drop what it saw.
            mask = _additive(see | ~seen, queries, len(seen))
            part, part_lse = _aten_forward(queries, keys_, values, mask, softmax_scale)
            out[rows] = _ungrouped(part, len(seen)).masked_fill_(~seen[..., None], 0).to(q.dtype)
            lse[rows] = _ungrouped(part_lse[..., None], len(seen))[..., 0].masked_fill_(~seen, -math.inf)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor, _: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grads = attention_backward(Upstream(grad_out, out, lse), q, k, v, ctx.chunks, ctx.softmax_scale)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None


def attention_backward(
    upstream: Upstream, q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[Chunk], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in fp32 or better."""
    dq, dk, dv = (torch.zeros_like(x, dtype=compute_dtype(q)) for x in (q, k, v))
    for rows, keys, visible in chunks:
        see = visible()
        queries, grad_out, out = (_grouped(x[rows], k.shape[-2]) for x in (q, upstream.grad_out, upstream.out))
        keys_, values = _heads_first(k, v, keys)
        lse = _grouped(upstream.softmax_lse[rows, :, None], k.shape[-2])[..., 0]
        lse = lse.masked_fill(lse == -math.inf, 0.0)  # a row without keys: exp(-inf - 0) is the 0 it should be
        mask = _additive(see, queries, len(see))
        grads = _aten_backward(grad_out, queries, keys_, values, out, lse, mask, softmax_scale)
        dq[rows] = _ungrouped(grads[0], len(see))
        for total, grad in ((dk, grads[1]), (dv, grads[2])):
            grad = grad[0].transpose(0, 1)  # [K, H, D]
            if isinstance(keys, slice):
                total[keys] += grad
            else:
                total.index_add_(0, keys, grad.unflatten(0, (len(keys), -1)))
    return dq, dk, dv


# --- ATen's layout: [1, H, C * G, D] ----------------------------------------------------------------------------


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """[C, H * G, D] -> [1, H, C * G, D]"""
    return x.to(compute_dtype(x)).unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)[None]


def _ungrouped(x: Tensor, num_rows: int) -> Tensor:
    """[1, H, C * G, D] -> [C, H * G, D]"""
    return x[0].unflatten(1, (num_rows, -1)).transpose(0, 1).flatten(1, 2)


def _heads_first(k: Tensor, v: Tensor, keys: slice | Tensor) -> list[Tensor]:
    """Those of the rows [R, H, D] or pages [pages, l', H, D] -> [1, H, K, D]"""
    chosen = [x[keys] if isinstance(keys, slice) else x.index_select(0, keys) for x in (k, v)]
    return [x.to(compute_dtype(x)).reshape(-1, *x.shape[-2:]).transpose(0, 1)[None] for x in chosen]


def _additive(visible: Tensor, queries: Tensor, num_rows: int) -> Tensor:
    """bool [C, K] -> 0 or -inf, [1, 1, C * G, K]: the heads of a group see the same keys."""
    mask = torch.zeros(visible.shape, dtype=queries.dtype, device=queries.device).masked_fill_(~visible, -math.inf)
    return mask.repeat_interleave(queries.shape[2] // num_rows, 0)[None, None]


def _aten_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[1, H, C * G, D] each -> out, softmax_lse [1, H, C * G]."""
    dim = max(q.shape[-1], v.shape[-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_widened(x, dim) for x in (q, k, v)), 0.0, False, attn_mask=mask, scale=scale
    )
    return out[..., : v.shape[-1]], lse


def _aten_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> list[Tensor]:
    """dq, dk, dv of `_aten_forward`."""
    dim = max(q.shape[-1], v.shape[-1])
    wide = [_widened(x, dim) for x in (grad_out, q, k, v, out)]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *wide, lse, 0.0, False, attn_mask=mask, scale=scale
    )
    return [grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True)]


def _widened(x: Tensor, dim: int) -> Tensor:
    """ATen wants one head dim for q, k and v; zeros change neither scores nor sums."""
    return x if x.shape[-1] == dim else torch.nn.functional.pad(x, (0, dim - x.shape[-1]))
