"""Selected attention (arXiv 2502.11089, section 3.3.2): every query attends to the tokens of its chosen blocks.

    out[t, h] = softmax over { keys of block_indices[t, h // G], up to t's own position } of (q . k) v

Shapes      T = query tokens, R = local key rows, Hq = Hkv * G heads, Dk / Dv = head dims, l' = slc_block_len, n = slots
    q               [T, Hq, Dk]         k, v [R, Hkv, Dk or Dv]     page p of a head is rows p*l' .. (p+1)*l'
    block_indices   int32 [T, Hkv, n]   global block ids, ascending and distinct in a row, -1 (last) for none
    block_table     int32 [Hkv, num_blocks]     global block id -> page; from R // l' on pages are remote
    position        int [T]             place in the padded stream, so position // l' is the own block; -1: padding
    k_remote, v_remote  [pages, l', Dk or Dv]   each page of one head; may be strided views of one buffer
    out             [T, Hq, Dv]         softmax_lse [T, Hq] fp32, natural log; a row without keys is (0, -inf)
Dtypes      bf16, fp16 (products in it, sums in fp32) and fp32. Remote pages may be fp32 while k and v are 16-bit: they
            are then rounded when read, and their gradient is fp32.
Gradients   of q, k, v and the remote pages, through out and softmax_lse; summed in fp32, rounded once, no atomics.
Loop order  a block at a time against all queries that chose it, at any G: see `slc_index`, `slc_forward`,
            `slc_backward`, `slc_parts`.
Bits        a query's result depends on its own list and keys only, not on its neighbours or on where pages lie.
Memory      `slc_tiles.WORKSPACE_BYTES` beside inputs and outputs, whatever T is, and fp32 dk, dv where T is cut.
Reference   nsa_kernels.reference.selected_attention
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.common.deltas import row_deltas
from nsa_kernels.common.rows import unit_stride
from nsa_kernels.selected.backward import differentiate_chunk
from nsa_kernels.selected.checks import check_inputs
from nsa_kernels.selected.forward import attend_chunk
from nsa_kernels.selected.index import build_block_index
from nsa_kernels.selected.rows import pack_rows
from nsa_kernels.selected.tiles import WORKSPACE_BYTES, backward_tiles, chunks, forward_tiles


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
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the tokens of its selected blocks, causal inside its own block: (out, softmax_lse).

    Shapes are at the head of this file. `workspace_bytes` bounds what is held beside inputs and outputs.
    Raises ValueError for shapes or dtypes it cannot take. Tensors whose last stride is not 1 are copied.
    """
    check_inputs(q, k, v, block_indices, block_table, position, slc_block_len, softmax_scale, k_remote, v_remote)
    q, k, v, k_remote, v_remote, block_table, position = _with_unit_stride(
        q, k, v, k_remote, v_remote, block_table, position
    )
    return _SelectedAttention.apply(
        q, k, v, k_remote, v_remote, block_indices, block_table, position,
        slc_block_len, softmax_scale, workspace_bytes,
    )  # fmt: skip


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
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor | None, ...]:
    """Gradients of `gate * selected_attention`, where these blocks may be only a part of what a query attended to.

    grad_out    [T, Hq, Dv]     gradient of the gated sum of all branches
    gate        [T, Hq]         this branch's gate, of any sign and strides; None: 1
    delta       [T, Hq] fp32    sum(grad_out * out) of the branch's whole, merged out, without its gate
    softmax_lse [T, Hq] fp32    of the whole, merged result

    dtype       of the gradients; None: each in that of its tensor

    The others are as in `selected_attention`. Returns dq, dk, dv, dk_remote, dv_remote (the last two None without
    remote pages).
    """
    check_inputs(q, k, v, block_indices, block_table, position, slc_block_len, softmax_scale, k_remote, v_remote)
    q, k, v, k_remote, v_remote, block_table, position = _with_unit_stride(
        q, k, v, k_remote, v_remote, block_table, position
    )
    return _gradients(
        grad_out, gate, delta, softmax_lse, q, k, v, k_remote, v_remote, block_indices, block_table, position,
        slc_block_len, softmax_scale, workspace_bytes, dtype,
    )  # fmt: skip


def _with_unit_stride(*tensors: Tensor | None) -> list[Any]:
    """Each as the kernels read it, row by row; copied if its last stride is not 1."""
    return [None if x is None else unit_stride(x) for x in tensors]


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.set_materialize_grads(False)
        out, lse = _attend(*inputs)
        ctx.save_for_backward(out, lse, *inputs[:8])
        ctx.options = inputs[8:]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        out, lse, *inputs = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else unit_stride(grad_out)
        delta = row_deltas(out, grad_out, grad_lse)
        q, k, v, k_remote, v_remote, block_indices, block_table, position = inputs
        slc_block_len, softmax_scale, workspace_bytes = ctx.options
        grads = _gradients(
            grad_out, None, delta, lse, q, k, v, k_remote, v_remote, block_indices, block_table, position,
            slc_block_len, softmax_scale, workspace_bytes, None,
        )  # fmt: skip
        return *grads, *[None] * 6


def _attend(
    q, k, v, k_remote, v_remote, block_indices, block_table, position,
    slc_block_len, softmax_scale, workspace_bytes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (num_queries, num_q_heads, head_dim_k), (_, num_kv_heads, head_dim_v) = q.shape, v.shape
    out = torch.empty(num_queries, num_q_heads, head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_queries, num_q_heads, dtype=torch.float32, device=q.device)
    group = num_q_heads // num_kv_heads
    tiles = forward_tiles(group, head_dim_k, head_dim_v)
    bytes_per_query = block_indices.shape[2] * group * (head_dim_v * _part_bytes(q) + 8)
    for rows, heads in chunks(num_queries, num_kv_heads, bytes_per_query, workspace_bytes):
        index = build_block_index(
            block_indices[rows, heads],
            position[rows],
            num_blocks=block_table.shape[1],
            slc_block_len=slc_block_len,
            item_queries=max(1, tiles.item_rows // group),
            segment_queries=tiles.segment_queries,
            gather_all=False,
        )
        attend_chunk(
            q[rows], k, v, k_remote, v_remote, block_table, block_indices[rows], position[rows], index,
            out[rows], lse[rows],
            head_start=heads.start, slc_block_len=slc_block_len, softmax_scale=softmax_scale,
        )  # fmt: skip
    return out, lse


def _gradients(
    grad_out, gate, delta, lse, q, k, v, k_remote, v_remote, block_indices, block_table, position,
    slc_block_len, softmax_scale, workspace_bytes, dtype,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dk_remote, dv_remote in `dtype`, or each in that of its tensor."""
    grad_out, about_rows = unit_stride(grad_out), pack_rows(lse, delta, gate, position)
    (num_queries, num_q_heads, head_dim_k), num_kv_heads = q.shape, k.shape[1]
    group = num_q_heads // num_kv_heads
    tiles = backward_tiles(group, head_dim_k, v.shape[2])
    bytes_per_query = block_indices.shape[2] * group * (head_dim_k * _part_bytes(q) + 4)
    parts = list(chunks(num_queries, num_kv_heads, bytes_per_query, workspace_bytes))
    cut = any(rows.stop - rows.start < num_queries for rows, _ in parts)
    dq = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    pages = (k, v, k_remote, v_remote)
    # Chunks of queries add to each other's sums, which stay in fp32 until the last; chunks of heads do not meet.
    sums = [_zeros(x, torch.float32 if cut else dtype) for x in pages]
    for rows, heads in parts:
        index = build_block_index(
            block_indices[rows, heads],
            position[rows],
            num_blocks=block_table.shape[1],
            slc_block_len=slc_block_len,
            item_queries=max(1, tiles.item_rows // group),
            segment_queries=tiles.segment_queries,
            gather_all=True,
        )
        differentiate_chunk(
            q[rows], k, v, k_remote, v_remote, block_table, block_indices[rows], index,
            grad_out[rows], about_rows[:, rows], dq[rows], sums,
            head_start=heads.start, slc_block_len=slc_block_len, softmax_scale=softmax_scale, add=rows.start > 0,
        )  # fmt: skip
    return dq, *[s if s is None else s.to(dtype or x.dtype) for s, x in zip(sums, pages, strict=True)]


def _part_bytes(q: Tensor) -> int:
    """Bytes of an element of a partial result: fp16 for 16-bit inputs, fp32 for fp32."""
    return 4 if q.dtype == torch.float32 else 2


def _zeros(like: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if like is None else torch.zeros(like.shape, dtype=dtype or like.dtype, device=like.device)
