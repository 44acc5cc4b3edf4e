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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels import contracts
from nsa_kernels.contracts import IntervalCall, SelectedCall, Upstream, meets
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
from nsa_kernels.reference.chunks import (
    Chunk,
    add_at,
    apart,
    compute_dtype,
    head_pages,
    interval_chunks,
    selected_chunks,
    wide_zeros,
)

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


# --- Public functions -------------------------------------------------------------------------------------------


@meets(contracts.interval_attention)
def compressed_attention(call: IntervalCall) -> tuple[Tensor, Tensor]:
    return _attend(call)


@meets(contracts.interval_attention)
def window_attention(call: IntervalCall) -> tuple[Tensor, Tensor]:
    return _attend(call)


@meets(contracts.interval_attention_backward)
def compressed_attention_backward(
    upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(upstream, call, kv_dtype)


@meets(contracts.interval_attention_backward)
def window_attention_backward(
    upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(upstream, call, kv_dtype)


@meets(contracts.selected_attention)
def selected_attention(call: SelectedCall) -> tuple[Tensor, Tensor]:
    q, k, v, k_remote, v_remote, block_indices, block_table, position, slc_block_len, softmax_scale = call
    group = q.shape[1] // k.shape[1]
    parts = []
    for head in range(k.shape[1]):
        pages = head_pages(head, k, v, k_remote, v_remote)
        chunks = selected_chunks(block_indices[:, head], block_table[head], position, slc_block_len, group)
        queries = q[:, head * group : (head + 1) * group]
        parts.append(_ChunkedAttention.apply(queries, *pages, chunks, softmax_scale))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


@meets(contracts.selected_attention_backward)
def selected_attention_backward(
    upstream: Upstream, call: SelectedCall, dtype: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    q, k, v, k_remote, v_remote, block_indices, block_table, position, slc_block_len, softmax_scale = call
    group = q.shape[1] // k.shape[1]
    above = AtenUpstream.of(upstream)
    dq, dk, dv = (wide_zeros(x) for x in (q, k, v))
    dk_remote, dv_remote = (None if x is None else wide_zeros(x) for x in (k_remote, v_remote))
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        pages = head_pages(head, k, v, k_remote, v_remote)
        chunks = selected_chunks(block_indices[:, head], block_table[head], position, slc_block_len, group)
        grads = attention_backward(above.of_heads(heads), q[:, heads], *pages, chunks, softmax_scale)
        dq[:, heads] = grads[0]
        for local, remote, grad in zip((dk, dv), (dk_remote, dv_remote), grads[1:], strict=True):
            local[:, head] = grad[: len(k), 0]
            if remote is not None:
                remote += grad[len(k) :, 0].unflatten(0, remote.shape[:2])
    pairs = ((dq, q), (dk, k), (dv, v), (dk_remote, k_remote), (dv_remote, v_remote))
    return tuple(None if g is None or x is None else g.to(dtype or x.dtype) for g, x in pairs)


def _attend(call: IntervalCall) -> tuple[Tensor, Tensor]:
    q, k, v, begin, end, softmax_scale = call
    return _ChunkedAttention.apply(q, k, v, interval_chunks(begin, end, q.shape[1]), softmax_scale)


def _gradients(upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, begin, end, softmax_scale = call
    chunks = interval_chunks(begin, end, q.shape[1])
    grads = attention_backward(AtenUpstream.of(upstream), q, k, v, chunks, softmax_scale)
    return grads[0].to(q.dtype), grads[1].to(kv_dtype or k.dtype), grads[2].to(kv_dtype or v.dtype)


# --- Attention chunk by chunk -----------------------------------------------------------------------------------


class AtenUpstream(NamedTuple):
    """What comes from above: of all the keys of a query, of which those at hand may be a part."""

    grad_out: Tensor  # [T, Hq, Dv], times the gate
    out: Tensor  # [T, Hq, Dv], of which ATen takes rowsum(grad_out * out) alone
    softmax_lse: Tensor  # [T, Hq]

    @classmethod
    def of(cls, upstream: Upstream) -> "AtenUpstream":
        """From delta [T, Hq] = rowsum(grad_out * out): `out` is one with that sum, all of it in one place of a row."""
        grad_out, gate, delta, softmax_lse = upstream
        wide = grad_out.to(compute_dtype(grad_out))
        largest = wide.abs().argmax(-1, keepdim=True)
        divisor = wide.gather(-1, largest)
        share = torch.where(divisor == 0, 0.0, delta[..., None] / divisor)
        out = torch.zeros_like(wide).scatter_(-1, largest, share.to(wide.dtype))
        return cls(wide if gate is None else wide * gate[..., None], out, softmax_lse)

    def of_heads(self, heads: slice) -> "AtenUpstream":
        return AtenUpstream(*(x[:, heads] for x in self))


class _ChunkedAttention(torch.autograd.Function):
    """q [T, Hq, Dk]; k, v rows [R, H, D]; every chunk's softmax(q k^T) v."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[Chunk], softmax_scale: float):
        ctx.chunks, ctx.softmax_scale = chunks, softmax_scale
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        lse = torch.full(q.shape[:2], -math.inf, dtype=compute_dtype(q), device=q.device)
        for rows, keys, visible in apart(chunks, [q], [k, v]):
            see = visible()
            queries, (keys_, values) = _grouped(q[rows], k.shape[1]), _heads_first(k, v, keys)
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
        grads = attention_backward(AtenUpstream(grad_out, out, lse), q, k, v, ctx.chunks, ctx.softmax_scale)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None


def attention_backward(
    upstream: AtenUpstream, q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[Chunk], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in fp32 or better."""
    dq, dk, dv = (wide_zeros(x) for x in (q, k, v))
    num_kv_heads = k.shape[1]
    lse = upstream.softmax_lse
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # a row without keys: exp(-inf - 0) is the 0 it should be
    for rows, keys, visible in apart(chunks, [q, upstream.grad_out, upstream.out, lse], [k, v]):
        see = visible()
        queries, grad_out, out = (_grouped(x[rows], num_kv_heads) for x in (q, upstream.grad_out, upstream.out))
        keys_, values = _heads_first(k, v, keys)
        rows_lse = _grouped(lse[rows, :, None], num_kv_heads)[..., 0]
        mask = _additive(see, queries, len(see))
        grads = _aten_backward(grad_out, queries, keys_, values, out, rows_lse, mask, softmax_scale)
        dq[rows] = _ungrouped(grads[0], len(see))
        add_at(dk, keys, grads[1][0].transpose(0, 1))  # [K, H, D]
        add_at(dv, keys, grads[2][0].transpose(0, 1))
    return dq, dk, dv


# --- ATen's layout: [1, H, C * G, D] ----------------------------------------------------------------------------


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """[C, H * G, D] -> [1, H, C * G, D]"""
    return x.to(compute_dtype(x)).unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)[None]


def _ungrouped(x: Tensor, num_rows: int) -> Tensor:
    """[1, H, C * G, D] -> [C, H * G, D]"""
    return x[0].unflatten(1, (num_rows, -1)).transpose(0, 1).flatten(1, 2)


def _heads_first(k: Tensor, v: Tensor, keys: slice | Tensor) -> list[Tensor]:
    """Those of the rows [R, H, D] -> [1, H, K, D]"""
    chosen = [x[keys] if isinstance(keys, slice) else x.index_select(0, keys) for x in (k, v)]
    return [x.to(compute_dtype(x)).transpose(0, 1)[None] for x in chosen]


def _additive(visible: Tensor, queries: Tensor, num_rows: int) -> Tensor:
    """bool [C, K] -> 0 or -inf, [1, 1, C * G, K]: the heads of a group see the same keys."""
    mask = torch.zeros(visible.shape, dtype=queries.dtype, device=queries.device).masked_fill_(~visible, -math.inf)
    return mask.repeat_interleave(queries.shape[2] // num_rows, 0)[None, None]


def _aten_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[1, H, C * G, D] each -> out, softmax_lse [1, H, C * G]."""
    dim = max(q.shape[-1], v.shape[-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_operand(x, dim) for x in (q, k, v)), 0.0, False, attn_mask=mask, scale=scale
    )
    return out[..., : v.shape[-1]], lse


def _aten_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> list[Tensor]:
    """dq, dk, dv of `_aten_forward`."""
    dim = max(q.shape[-1], v.shape[-1])
    wide = [_operand(x, dim) for x in (grad_out, q, k, v, out)]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *wide, lse.contiguous(), 0.0, False, attn_mask=mask, scale=scale
    )
    return [grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True)]


def _operand(x: Tensor, dim: int) -> Tensor:
    """`x` as ATen reads it, which is unchecked here: rows of `dim` neighbouring numbers that do not overlap.

    It wants one head dim for q, k and v; zeros change neither scores nor sums.
    """
    if x.shape[-1] < dim:
        return torch.nn.functional.pad(x, (0, dim - x.shape[-1]))
    fits = x.stride(-1) == 1 and x.stride(-2) >= dim
    return x if fits else x.clone(memory_format=torch.contiguous_format)
