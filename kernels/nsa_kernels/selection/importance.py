"""Block importances of a chunk of queries, in the layers that `select` adds up.

    out[h, t, m, j] = sum_r w(r - m * S) * sum_g exp(softmax_scale * q[t, h*G + g] . k[S * j + r, h] - lse[t, h*G + g])

over the S = l' / d keys r of block j: what they give to block j + m.

Shapes      as `select`; out fp32 [Hkv, queries of the chunk, layers, blocks], written where a query sees a key of j
Numerics    everything after the tensor cores is fp32
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2, split_head_dim
from nsa_kernels.common.tiles import dot_precision
from nsa_kernels.selection.tiles import importance_tile

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**31 - 1)


@launchable
@triton.jit
def _importance_kernel(
    q_ptr, k_ptr, lse_ptr, begin_ptr, end_ptr,
    imp_ptr,
    first_query, last_query, chunk_len, num_keys, num_heads_kv, num_blocks, softmax_scale,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_lt, stride_lh,
    G: tl.constexpr, G_PAD: tl.constexpr, DK_A: tl.constexpr, DK_B: tl.constexpr,
    CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr, SLC_PAD: tl.constexpr, NUM_LAYERS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """buffer[h, query of the chunk, layer, j] for BLOCK_Q queries and every block j that holds a key they see."""
    head = tl.program_id(0) % num_heads_kv
    query = first_query + tl.program_id(0) // num_heads_kv * BLOCK_Q + tl.arange(0, BLOCK_Q)
    begin, num_seen = interval(begin_ptr, end_ptr, query, last_query)
    if tl.max(num_seen) == 0:
        return
    row = tl.arange(0, BLOCK_Q * G_PAD)  # row r is query r // G_PAD, head r % G_PAD
    row_query = first_query + tl.program_id(0) // num_heads_kv * BLOCK_Q + row // G_PAD
    row_begin, row_seen = interval(begin_ptr, end_ptr, row_query, last_query)
    row_query = tl.minimum(row_query, last_query - 1).to(tl.int64)
    row_head = head * G + tl.minimum(row % G_PAD, G - 1)

    dim_a = tl.arange(0, DK_A)
    q_rows = q_ptr + (row_query * stride_qt + row_head.to(tl.int64) * stride_qh)[:, None]
    q_a = tl.load(q_rows + dim_a)
    if DK_B:
        dim_b = DK_A + tl.arange(0, DK_B)
        q_b = tl.load(q_rows + dim_b)
    lse = tl.load(lse_ptr + row_query * stride_lt + row_head.to(tl.int64) * stride_lh)
    base = tl.where((row % G_PAD < G) & (row_seen > 0), lse * LOG2_E, float("inf"))  # p = 0 on the rows that pad
    scale = softmax_scale * LOG2_E
    k_ptr += head.to(tl.int64) * stride_kh
    imp_rows = imp_ptr + (head.to(tl.int64) * chunk_len + query - first_query)[:, None] * NUM_LAYERS * num_blocks

    # Columns run over residues slowly, blocks fast: the S keys of a block then lie in one thread's registers.
    column = tl.arange(0, SLC_PAD * BLOCK_J)
    column_key = column % BLOCK_J * CELLS_SLC + column // BLOCK_J
    residue = tl.arange(0, SLC_PAD)[None, None, :, None]

    # One turn for each document that the tile holds; nearly always there is one.
    doc = tl.min(tl.where(num_seen > 0, begin, FAR))
    while doc < FAR:
        seen = tl.where(row_begin == doc, row_seen, 0)  # [rows], keys of this document that the row sees
        most = tl.max(seen)
        least = tl.min(seen)
        for first_key in tl.range(0, most, BLOCK_J * CELLS_SLC):
            key = first_key + column_key  # counted from the document's first
            key_row = tl.minimum(doc + key, num_keys - 1).to(tl.int64)
            k_rows = k_ptr + key_row[None, :] * stride_kn
            s = tl.dot(q_a, tl.load(k_rows + dim_a[:, None]), input_precision=PRECISION)  # [rows, columns]
            if DK_B:
                s = tl.dot(q_b, tl.load(k_rows + dim_b[:, None]), s, input_precision=PRECISION)
            if first_key + BLOCK_J * CELLS_SLC > least:
                s = tl.where(key[None, :] < seen[:, None], s, float("-inf"))
            p = tl.exp2(tl.fma(s, scale, -base[:, None]))
            p = tl.reshape(p, [BLOCK_Q, G_PAD, SLC_PAD, BLOCK_J])

            block = first_key // CELLS_SLC + tl.arange(0, BLOCK_J)
            stored = (begin == doc)[:, None] & (num_seen > 0)[:, None] & (block < num_blocks)[None, :]
            for layer in tl.static_range(NUM_LAYERS):
                # Eq. 9 for offset k = residue - layer * S; a padding residue weighs nothing.
                cells = tl.minimum(residue - layer * CELLS_SLC + CELLS_CMP, CELLS_SLC)
                cells -= tl.maximum(residue - layer * CELLS_SLC, 0)
                weight = tl.where(residue < CELLS_SLC, tl.maximum(cells, 0), 0).to(tl.float32)
                # -0.0, unlike 0.0, is what the compiler may leave out of a sum.
                share = tl.sum(tl.sum(tl.where(weight > 0, p * weight, -0.0), 2), 1)  # [BLOCK_Q, BLOCK_J]
                tl.store(imp_rows + layer * num_blocks + block[None, :], share, mask=stored)
        doc = tl.min(tl.where((num_seen > 0) & (begin > doc), begin, FAR))


@triton.jit
def interval(begin_ptr, end_ptr, query, last_query):
    """The first compressed key of each query and how many it sees; none past the end of the chunk."""
    begin = tl.load(begin_ptr + query, mask=query < last_query, other=0)
    end = tl.load(end_ptr + query, mask=query < last_query, other=0)
    return begin, tl.maximum(end - begin, 0)


def importance(
    q: Tensor, k: Tensor, lse: Tensor, begin: Tensor, end: Tensor, out: Tensor, first: int, last: int,
    *, softmax_scale: float, cells_cmp: int, cells_slc: int,
) -> None:  # fmt: skip
    """Writes `out` for the queries [first, last)."""
    num_keys, num_kv_heads = k.shape[:2]
    group = q.shape[1] // num_kv_heads
    group_pad = next_power_of_2(group)
    cells_pad = next_power_of_2(cells_slc)
    dim_a, dim_b = split_head_dim(q.shape[2])
    tile = importance_tile(q.dtype, group_pad)
    _importance_kernel[(cdiv(last - first, tile["BLOCK_Q"]) * num_kv_heads,)](
        q, k, lse, begin, end,
        out,
        first, last, out.shape[1], num_keys, num_kv_heads, out.shape[3], softmax_scale,
        *q.stride()[:2], *k.stride()[:2], *lse.stride(),
        G=group, G_PAD=group_pad, DK_A=dim_a, DK_B=dim_b,
        CELLS_CMP=cells_cmp, CELLS_SLC=cells_slc, SLC_PAD=cells_pad,
        NUM_LAYERS=out.shape[2], BLOCK_J=max(1, 128 // cells_pad), PRECISION=dot_precision(q.dtype), **tile,
    )  # fmt: skip
