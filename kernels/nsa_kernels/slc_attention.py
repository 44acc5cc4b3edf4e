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
Loop order  a block at a time against all queries that chose it: see `slc_index`, `slc_forward`, `slc_backward`.
Bits        a query's result depends on its own list and keys only, not on its neighbours or on where pages lie.
Memory      `slc_tiles.WORKSPACE_BYTES` beside inputs and outputs, whatever T is, and fp32 dk, dv where T is cut.
Reference   nsa_kernels.reference.selected_attention
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .slc_backward import differentiate_chunk, row_deltas
from .slc_forward import attend_chunk
from .slc_index import build_block_index
from .slc_pages import split_width
from .slc_tiles import WORKSPACE_BYTES, backward_tiles, chunks, forward_tiles

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    Raises ValueError for shapes, dtypes or strides it cannot take.
    """
    _check(q, k, v, block_indices, block_table, position, slc_block_len, softmax_scale, k_remote, v_remote)
    return _SelectedAttention.apply(
        q, k, v, k_remote, v_remote, block_indices, block_table, position,
        slc_block_len, softmax_scale, workspace_bytes,
    )  # fmt: skip


def selected_attention_backward(
    grad_out: Tensor,
    out: Tensor,
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
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor | None, ...]:
    """Gradients of `selected_attention` where these blocks may be only a part of what a query attended to.

    grad_out, out [T, Hq, Dv] and softmax_lse [T, Hq] belong to the whole, merged result; the others are as in
    `selected_attention`. Returns dq, dk, dv, dk_remote, dv_remote in fp32 (the last two None without remote pages).
    """
    _check(q, k, v, block_indices, block_table, position, slc_block_len, softmax_scale, k_remote, v_remote)
    return _gradients(
        grad_out, None, out, softmax_lse, q, k, v, k_remote, v_remote, block_indices, block_table, position,
        slc_block_len, softmax_scale, workspace_bytes, torch.float32,
    )  # fmt: skip


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
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = _gradients(grad_out, grad_lse, out, lse, *inputs, *ctx.options, None)
        return *grads, *[None] * (len(inputs) + len(ctx.options) - len(grads))


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
    grad_out, grad_lse, out, lse, q, k, v, k_remote, v_remote, block_indices, block_table, position,
    slc_block_len, softmax_scale, workspace_bytes, dtype,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dk_remote, dv_remote in `dtype`, or each in that of its tensor."""
    if grad_out.stride(2) != 1:  # an expanded gradient, as of out.sum(): the kernels read rows of unit stride
        grad_out = grad_out.contiguous()
    lse = lse.contiguous()
    delta = row_deltas(out, grad_out, grad_lse)
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
            q[rows], k, v, k_remote, v_remote, block_table, block_indices[rows], position[rows], index,
            grad_out[rows], lse[rows], delta[rows], dq[rows], *sums,
            head_start=heads.start, slc_block_len=slc_block_len, softmax_scale=softmax_scale, add=rows.start > 0,
        )  # fmt: skip
    return dq, *[s if s is None else s.to(dtype or x.dtype) for s, x in zip(sums, pages, strict=True)]


def _part_bytes(q: Tensor) -> int:
    """Bytes of an element of a partial result: fp16 for 16-bit inputs, fp32 for fp32."""
    return 4 if q.dtype == torch.float32 else 2


def _zeros(like: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if like is None else torch.zeros(like.shape, dtype=dtype or like.dtype, device=like.device)


def _check(q, k, v, block_indices, block_table, position, slc_block_len, softmax_scale, k_remote, v_remote) -> None:
    if q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: the key-value heads must divide "
            f"the query heads, k and v must have the same rows and heads, q and k the same head dim"
        )
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype} must be one of bfloat16, float16, float32, the same for all "
            f"three, because tensor cores take both operands in one dtype; cast them, or use nsa_kernels.reference"
        )
    if slc_block_len < 16 or slc_block_len & (slc_block_len - 1) or k.shape[0] % slc_block_len:
        raise ValueError(
            f"slc_block_len={slc_block_len} must be a power of two from 16 on and divide the {k.shape[0]} rows of k, "
            f"because a page is one tile; pad each document to whole blocks, or use nsa_kernels.reference"
        )
    expected = (q.shape[0], k.shape[1])
    if block_indices.shape[:2] != expected or position.shape != expected[:1] or block_table.shape[0] != expected[1]:
        raise ValueError(
            f"block_indices {tuple(block_indices.shape)}, block_table {tuple(block_table.shape)} and position "
            f"{tuple(position.shape)} must be [T, Hkv, n], [Hkv, num_blocks] and [T] with T={q.shape[0]} and "
            f"Hkv={k.shape[1]}, one row for each query and key-value head; pass them for this rank's tokens"
        )
    if not softmax_scale > 0:
        raise ValueError(
            f"softmax_scale={softmax_scale} must be positive, because the largest score is scaled after it is found; "
            f"pass head_dim ** -0.5, or negate q"
        )
    _check_width("Dk", q.shape[2], two=True)
    _check_width("Dv", v.shape[2], two=False)
    if (k_remote is None) != (v_remote is None):
        raise ValueError(
            f"k_remote is {_given(k_remote)}, v_remote is {_given(v_remote)}: they must be given together, because a "
            f"page has keys and values; pass both or neither"
        )
    if k_remote is not None and (
        k_remote.shape[1:] != (slc_block_len, q.shape[2]) or v_remote.shape != (*k_remote.shape[:2], v.shape[2])
    ):
        raise ValueError(
            f"k_remote {tuple(k_remote.shape)} and v_remote {tuple(v_remote.shape)} must be [pages, {slc_block_len}, D], "
            f"D={q.shape[2]} and {v.shape[2]}, because pages are read like k and v; split the fetched buffer so"
        )
    for name, x in (("q", q), ("k", k), ("v", v), ("k_remote", k_remote), ("v_remote", v_remote)):
        if x is not None and x.stride(2) != 1:
            raise ValueError(
                f"{name} has strides {tuple(x.stride())}: its last dim must have stride 1, because rows are read as "
                f"vectors; pass {name}.contiguous()"
            )


def _given(x: Tensor | None) -> str:
    return "missing" if x is None else "given"


def _check_width(name: str, width: int, *, two: bool) -> None:
    second = split_width(width)[1]
    if width < 16 or (second and (not two or second < 16 or second & (second - 1))):
        raise ValueError(
            f"{name}={width} must be a power of two from 16 on{' or the sum of two such' if two else ''}, because the "
            f"kernels' tiles are that wide; pad the head dim with zeros, or use nsa_kernels.reference"
        )
