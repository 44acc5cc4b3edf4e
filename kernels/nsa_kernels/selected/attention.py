"""Selected attention (arXiv 2502.11089, section 3.3.2): every query attends to the tokens of its chosen blocks.

    out[t, h] = softmax over { keys of block_indices[t, h // G], up to t's own position } of (q . k) v

Shapes      `contracts.selected_attention`
Dtypes      bf16, fp16 (products in it, sums in fp32) and fp32. Remote pages may be fp32 while k and v are 16-bit: they
            are then rounded when read, and their gradient is fp32.
Gradients   of q, k, v and the remote pages, through out and softmax_lse; summed in fp32, rounded once, no atomics.
Loop order  a block at a time against all queries that chose it, at any G: see `index`, `forward`,
            `backward`, `parts`.
Bits        a query's result depends on its own list and keys only, not on its neighbours or on where pages lie.
Short way   queries whose visible blocks are all chosen: `short`, where the caller says which they are.
Memory      `tiles.WORKSPACE_BYTES` beside inputs and outputs, whatever T is, and fp32 dk, dv where T is cut, or of the
            keys of the short way.
Reference   nsa_kernels.reference.selected_attention
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels import contracts
from nsa_kernels.common.deltas import row_deltas
from nsa_kernels.common.limits import check_selected
from nsa_kernels.common.rows import unit_stride
from nsa_kernels.contracts import SelectedCall, Upstream, meets
from nsa_kernels.selected.backward import differentiate_chunk, pack_rows
from nsa_kernels.selected.forward import attend_chunk
from nsa_kernels.selected.index import BlockIndex, build_block_index
from nsa_kernels.selected.pages import add_to_pages
from nsa_kernels.selected.short import ShortRows, whole_sums
from nsa_kernels.selected.short import attend as attend_short
from nsa_kernels.selected.short import key_gradients as short_key_gradients
from nsa_kernels.selected.short import query_gradients as short_query_gradients
from nsa_kernels.selected.tiles import (
    WORKSPACE_BYTES,
    BackwardTiles,
    ForwardTiles,
    backward_tiles,
    chunks,
    forward_tiles,
)


@meets(contracts.selected_attention)
def selected_attention(
    call: SelectedCall, *, workspace_bytes: int = WORKSPACE_BYTES, short: ShortRows | None = None
) -> tuple[Tensor, Tensor]:
    """Options of these kernels:

    workspace_bytes     bounds what is held beside inputs and outputs
    short               queries that chose all the blocks they see, which is not checked, and how they find their keys:
                        they take a shorter way (`short`); None: none of them does
    """
    check_selected(call)
    call = _with_unit_stride(call)
    if torch.is_grad_enabled():
        return _SelectedAttention.apply(workspace_bytes, short, *call)
    return _attend(call, workspace_bytes, short)


@meets(contracts.selected_attention_backward)
@torch.no_grad()
def selected_attention_backward(
    upstream: Upstream,
    call: SelectedCall,
    dtype: torch.dtype | None,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
    short: ShortRows | None = None,
) -> tuple[Tensor | None, ...]:
    """workspace_bytes, short     as in `selected_attention`"""
    check_selected(call)
    return _gradients(upstream, _with_unit_stride(call), workspace_bytes, short, dtype)


def _with_unit_stride(call: SelectedCall) -> SelectedCall:
    """Tensors as the kernels read them, row by row: copied if their last stride is not 1."""
    k_remote, v_remote = (None if x is None else unit_stride(x) for x in (call.k_remote, call.v_remote))
    return call._replace(
        q=unit_stride(call.q),
        k=unit_stride(call.k),
        v=unit_stride(call.v),
        k_remote=k_remote,
        v_remote=v_remote,
        block_table=unit_stride(call.block_table),
        position=unit_stride(call.position),
    )


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, workspace_bytes, short, *call):
        ctx.set_materialize_grads(False)
        out, lse = _attend(SelectedCall(*call), workspace_bytes, short)
        ctx.save_for_backward(out, lse, *call[:8])
        ctx.sizes, ctx.workspace_bytes, ctx.short = call[8:], workspace_bytes, short
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        out, lse, *tensors = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else unit_stride(grad_out)
        upstream = Upstream(grad_out, None, row_deltas(out, grad_out, grad_lse), lse)
        grads = _gradients(upstream, SelectedCall(*tensors, *ctx.sizes), ctx.workspace_bytes, ctx.short, None)
        return None, None, *grads, *[None] * 5


def _attend(call: SelectedCall, workspace_bytes: int, short: ShortRows | None) -> tuple[Tensor, Tensor]:
    q, v = call.q, call.v
    (num_queries, num_q_heads, head_dim_k), (_, num_kv_heads, head_dim_v) = q.shape, v.shape
    out = torch.empty(num_queries, num_q_heads, head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_queries, num_q_heads, dtype=torch.float32, device=q.device)
    group = num_q_heads // num_kv_heads
    tiles = forward_tiles(group, head_dim_k, head_dim_v)
    others, of_others = _others(call, short)
    bytes_per_query = others.block_indices.shape[2] * group * (head_dim_v * _part_bytes(q) + 8)
    for rows, heads in chunks(len(others.q), num_kv_heads, bytes_per_query, workspace_bytes):
        part = _of_rows(others, rows)
        index = _index(part, heads, tiles, gather_all=False)
        attend_chunk(part, index, out[of_others][rows], lse[of_others][rows], head_start=heads.start)
    if short is not None:
        attend_short(call, short, out, lse)
    return out, lse


def _gradients(
    upstream: Upstream, call: SelectedCall, workspace_bytes: int, short: ShortRows | None, dtype: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dk_remote, dv_remote in `dtype`, or each in that of its tensor."""
    q, k, v = call.q, call.k, call.v
    upstream = upstream._replace(grad_out=unit_stride(upstream.grad_out))
    (_, num_q_heads, head_dim_k), num_kv_heads = q.shape, k.shape[1]
    group = num_q_heads // num_kv_heads
    tiles = backward_tiles(group, head_dim_k, v.shape[2])
    others, of_others = _others(call, short)
    bytes_per_query = others.block_indices.shape[2] * group * (head_dim_k * _part_bytes(q) + 4)
    parts = list(chunks(len(others.q), num_kv_heads, bytes_per_query, workspace_bytes))
    cut = any(rows.stop - rows.start < len(others.q) for rows, _ in parts)
    dq = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    pages: tuple[Any, ...] = (k, v, call.k_remote, call.v_remote)
    # Chunks of queries add to each other's sums, which stay in fp32 until the last, and so do copies of blocks, which
    # come after them; chunks of heads do not meet.
    found = None if short is None else short_key_gradients(upstream, call, short, dtype)
    copied = short is not None and short.blocks is not None
    sums = [_zeros(x, torch.float32 if cut or copied else dtype) for x in pages]
    in_place = None if found is None or copied else (found.dk, found.dv)
    if in_place is not None and not parts:
        sums[:2] = whole_sums(in_place, sums[:2])
    if parts:
        grad_out = upstream.grad_out[of_others]
        about_rows = pack_rows(*_about(upstream, of_others), others.position)
    for rows, heads in parts:
        part = _of_rows(others, rows)
        index = _index(part, heads, tiles, gather_all=True)
        differentiate_chunk(
            part, index, grad_out[rows], about_rows[:, rows], dq[of_others][rows], sums,
            head_start=heads.start, add=rows.start > 0, short=in_place if rows.start == 0 else None,
        )  # fmt: skip
    if short is not None and found is not None:
        if short.blocks is not None:
            add_to_pages(found.dk, found.dv, short.blocks, call, sums)
        short_query_gradients(found, short, dq)
    return dq, *[s if s is None else s.to(dtype or x.dtype) for s, x in zip(sums, pages, strict=True)]


def _others(call: SelectedCall, short: ShortRows | None) -> tuple[SelectedCall, slice]:
    """The call without the queries of the short way, and which rows it has."""
    return (call, slice(0, len(call.q))) if short is None else (short.other_queries(call), short.others)


def _about(upstream: Upstream, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    gate = None if upstream.gate is None else upstream.gate[rows]
    return upstream.softmax_lse[rows], upstream.delta[rows], gate


def _of_rows(call: SelectedCall, rows: slice) -> SelectedCall:
    """The same for some of its queries."""
    if rows == slice(0, len(call.q)):
        return call
    return call._replace(q=call.q[rows], block_indices=call.block_indices[rows], position=call.position[rows])


def _index(call: SelectedCall, heads: slice, tiles: ForwardTiles | BackwardTiles, *, gather_all: bool) -> BlockIndex:
    return build_block_index(
        call.block_indices[:, heads],
        call.position,
        num_blocks=call.block_table.shape[1],
        slc_block_len=call.slc_block_len,
        item_queries=max(1, tiles.item_rows // (call.q.shape[1] // call.k.shape[1])),
        segment_queries=tiles.segment_queries,
        gather_all=gather_all,
    )


def _part_bytes(q: Tensor) -> int:
    """Bytes of an element of a partial result: fp16 for 16-bit inputs, fp32 for fp32."""
    return 4 if q.dtype == torch.float32 else 2


def _zeros(like: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if like is None else torch.zeros(like.shape, dtype=dtype or like.dtype, device=like.device)
