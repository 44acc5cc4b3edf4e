"""Native Sparse Attention in plain PyTorch: the one truth that every kernel and parallel path is held to.

Written from the equations of arXiv 2502.11089, in any floating dtype (fp64 included) on any device. Nothing here
imports a kernel. Memory is bounded by working on chunks of queries; backward recomputes each chunk.

Shapes      T = query tokens here, R = key rows here, M = compressed blocks of the whole sequence,
            Hq / Hkv = query / key-value heads, G = Hq // Hkv, Dk / Dv = head dims of q,k / v,
            l / d / l' = cmp_block_len / cmp_stride / slc_block_len, n = num_slc_blocks
Order       Query heads h*G .. h*G+G-1 share key-value head h.
Positions   `position[t]` is a token's place in the stream in which every document is padded to whole selection
            blocks, so `position // l'` is its global selection block; -1 marks a padding row, which sees nothing.
Numerics    bf16 and fp16 are computed in fp32 and rounded once, to the dtype of q. `softmax_lse` is the natural log,
            fp32 (fp64 for fp64 inputs). A row that sees no key is (out = 0, softmax_lse = -inf).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.reference.backward import (
    compressed_attention_backward,
    selected_attention_backward,
    window_attention_backward,
)
from nsa_kernels.reference.chunks import (
    QueryChunks,
    compute_dtype,
    head_pages,
    interval_chunks,
    interval_spans,
    outside_autocast,
    selected_chunks,
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


# --- Compression (section 3.3.1, eq. 7) ------------------------------------------------------------------------


def gather_blocks(x: Tensor, block_rows: Tensor, block_len: int) -> Tensor:
    """Rows `block_rows[i] .. block_rows[i] + block_len` of `x` [R, Hkv, D], as [M, block_len, Hkv, D]."""
    rows = block_rows.long()[:, None] + torch.arange(block_len, device=x.device)
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def compress_mean(x: Tensor, block_rows: Tensor, block_len: int) -> Tensor:
    """The parameter-free phi: the mean of every block of `x` [R, Hkv, D], as [M, Hkv, D]."""
    blocks = gather_blocks(x, block_rows, block_len)
    return blocks.to(compute_dtype(x)).mean(1).to(x.dtype)


def compress_mlp(x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The learnable phi (eq. 7): an MLP over the concatenated block, its intra-block position embedding added first.

        y[i, h] = gelu(vec(x[block i, h] + pos_emb[h]) @ w1[h]) @ w2[h]        gelu in its tanh form

    x           [R, Hkv, D]         block i is rows block_rows[i] .. block_rows[i] + l
    pos_emb     [Hkv, l, D]         w1 [Hkv, l * D, F]        w2 [Hkv, F, D]
    returns     [M, Hkv, D]         dtype of x
    """
    return _Recomputed.apply(_mlp, x, block_rows, pos_emb, w1, w2)


def _mlp(x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    block_len = pos_emb.shape[1]
    dtype = compute_dtype(x)
    blocks = gather_blocks(x, block_rows, block_len).to(dtype)  # [M, l, Hkv, D]
    flat = (blocks.transpose(1, 2) + pos_emb.to(dtype)).flatten(2)  # [M, Hkv, l * D]
    hidden = F.gelu(torch.bmm(flat.transpose(0, 1), w1.to(dtype)), approximate="tanh")  # [Hkv, M, F]
    return torch.bmm(hidden, w2.to(dtype)).transpose(0, 1).to(x.dtype)


class _Recomputed(torch.autograd.Function):
    """A function of tensors that backward runs again: its products stay fp32 or better under autocast, both times."""

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], *tensors: Tensor):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with outside_autocast(tensors[0]):
            return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        wanted = ctx.needs_input_grad[1:]
        with outside_autocast(grad), torch.enable_grad():
            inputs = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
            y = ctx.function(*inputs)
            grads = iter(torch.autograd.grad(y, [x for x in inputs if x.requires_grad], grad))
        return None, *(next(grads) if w else None for w in wanted)


def compress_mlp_pair(
    k: Tensor, v: Tensor, block_rows: Tensor, phi_k: tuple[Tensor, ...], phi_v: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """`compress_mlp` of k and of v, each phi its (pos_emb, w1, w2)."""
    return compress_mlp(k, block_rows, *phi_k), compress_mlp(v, block_rows, *phi_v)


# --- Attention over one interval of keys per query: the compressed and the window branch ------------------------


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the compressed blocks it may see, rows `[begin[t], end[t])` (section 3.3.1).

    q [T, Hq, Dk]   k [M, Hkv, Dk]   v [M, Hkv, Dv]   begin, end int32 [T], both non-decreasing
    returns out [T, Hq, Dv] in the dtype of q, softmax_lse [T, Hq]
    """
    return _interval_attention(q, k, v, begin, end, softmax_scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query to its window, rows `[begin[t], end[t])` of k and v (section 3.3.3).

    Keys may begin before the first query: a halo from another rank. Shapes as `compressed_attention`, with R rows.
    """
    return _interval_attention(q, k, v, begin, end, softmax_scale)


def _interval_attention(q, k, v, begin, end, softmax_scale):
    _check_heads(q, k, v)
    return QueryChunks.apply(interval_chunks(begin, end, q.shape[1]), softmax_scale, q, k, v)


# --- Importance and selection (section 3.3.2, eq. 8 to 12) ------------------------------------------------------


def overlap_weights(cmp_block_len: int, cmp_stride: int, slc_block_len: int) -> dict[int, int]:
    """`w(i - j * l'/d)`: how many stride-sized cells compressed block i shares with selection block j (eq. 9).

    >>> overlap_weights(32, 16, 64)
    {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}
    """
    cells_per_cmp, cells_per_slc = cmp_block_len // cmp_stride, slc_block_len // cmp_stride
    return {k: min(k + cells_per_cmp, cells_per_slc) - max(k, 0) for k in range(1 - cells_per_cmp, cells_per_slc)}


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse_cmp: Tensor,
    cmp_begin: Tensor,
    cmp_end: Tensor,
    position: Tensor,
    doc_start: Tensor,
    *,
    softmax_scale: float,
    cmp_block_len: int,
    cmp_stride: int,
    slc_block_len: int,
    num_slc_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
) -> Tensor:
    """The n selection blocks of every query and key-value head, forced ones included, ascending, -1 for none.

    Importance is eq. 9 over the compressed probabilities, summed over the G heads of the group (eq. 10). Forced: the
    document's first `num_init_blocks` and the last `num_local_blocks` up to the query's own. Among the others larger
    importance wins, ties go to the lower index. No gradient passes.

    q, k_cmp, cmp_begin, cmp_end as `compressed_attention`, lse_cmp [T, Hq] its softmax_lse; position, doc_start
    integer [T] in the padded stream (doc_start: of the first token of the query's document)
    returns block_indices int32 [T, Hkv, n], global block ids
    """
    num_queries, num_q_heads = q.shape[:2]
    out = torch.full((num_queries, k_cmp.shape[1], num_slc_blocks), -1, dtype=torch.int32, device=q.device)
    own_block = torch.div(position - doc_start, slc_block_len, rounding_mode="floor").long()  # [T], < 0 for padding
    first_block = torch.div(doc_start, slc_block_len, rounding_mode="floor").long()
    weights = overlap_weights(cmp_block_len, cmp_stride, slc_block_len)
    for rows, keys in interval_spans(cmp_begin, cmp_end, num_q_heads):
        own = own_block[rows, None]  # [C, 1]
        num_blocks = int(own.max()) + 1
        if num_blocks <= 0:
            continue
        begin, end = (t[rows].long() - keys.start for t in (cmp_begin, cmp_end))
        p = _group_probabilities(q[rows], k_cmp[keys], lse_cmp[rows], begin, end, softmax_scale)  # [C, Hkv, K]
        imp = _importance(p, begin, end, num_blocks, slc_block_len // cmp_stride, weights)  # [C, Hkv, J]
        j = torch.arange(num_blocks, device=q.device)
        visible = j <= own  # [C, J]
        forced = (j < num_init_blocks) | (j > own - num_local_blocks)
        imp = imp.masked_fill(forced[:, None], math.inf).masked_fill(~visible[:, None], -math.inf)
        # A stable sort keeps the lower index first among equals; torch.topk promises no order.
        best = imp.sort(dim=-1, descending=True, stable=True).indices[..., :num_slc_blocks]
        chosen = visible[:, None].expand_as(imp).gather(-1, best)
        ids = best.masked_fill(~chosen, num_blocks).sort(-1).values  # the unchosen go last
        ids = torch.where(ids < num_blocks, ids + first_block[rows, None, None], -1)
        out[rows, :, : ids.shape[-1]] = ids.to(torch.int32)
    return out


def _importance(p: Tensor, begin: Tensor, end: Tensor, num_blocks: int, cmp_per_slc: int, weights: dict[int, int]):
    """Eq. 9: p [C, Hkv, K] over compressed rows -> [C, Hkv, num_blocks]; document starts at row `begin` [C]."""
    imp = p.new_zeros(*p.shape[:2], num_blocks)
    if p.shape[-1] == 0:
        return imp
    # Compressed block i = j * l'/d + offset of the document is row begin + i.
    first = begin[:, None] + torch.arange(num_blocks, device=p.device) * cmp_per_slc  # [C, J]
    for offset, weight in weights.items():
        row = first + offset
        inside = (row >= begin[:, None]) & (row < end[:, None])
        row = row.clamp(0, p.shape[-1] - 1)[:, None].expand_as(imp)
        imp += weight * p.gather(-1, row).masked_fill(~inside[:, None], 0)
    return imp


def _group_probabilities(q, k_cmp, lse_cmp, begin, end, softmax_scale):
    """p_cmp summed over the heads of each group (eq. 8, 10): [C, Hkv, K], fp32 or better, 0 where not visible."""
    num_q_heads, num_kv_heads = q.shape[1], k_cmp.shape[1]
    dtype = compute_dtype(q)
    row = torch.arange(k_cmp.shape[0], device=q.device)
    visible = (row >= begin[:, None]) & (row < end[:, None])  # [C, K]
    grouped = q.to(dtype).unflatten(1, (num_kv_heads, num_q_heads // num_kv_heads))  # [C, Hkv, G, Dk]
    with outside_autocast(q):
        scores = torch.einsum("chgd,khd->chgk", grouped, k_cmp.to(dtype)) * softmax_scale
    lse = lse_cmp.to(dtype).unflatten(1, grouped.shape[1:3])[..., None]
    p = torch.exp(scores - lse).masked_fill(~visible[:, None, None], 0)
    return p.sum(2)


# --- Selected attention (section 3.3.2) -------------------------------------------------------------------------


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
    """Attention of every query to the tokens of its selected blocks, causal inside its own block.

    q               [T, Hq, Dk]
    k, v            [R, Hkv, Dk or Dv]      whole blocks: page p is rows p*l' .. (p+1)*l'
    block_indices   int32 [T, Hkv, n]       global block ids, -1 for none
    block_table     int32 [Hkv, num_blocks] global block id -> page; pages from R // l' on are remote ones
    position        integer [T]             padded-stream position of each query
    k_remote, v_remote  [pages, l', Dk or Dv]   pages fetched from other ranks, each for one key-value head
    returns out [T, Hq, Dv] in the dtype of q, softmax_lse [T, Hq]
    """
    _check_heads(q, k, v)
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        pages = head_pages(head, k, v, k_remote, v_remote)
        chunks = selected_chunks(block_indices[:, head], block_table[head], position, slc_block_len, group)
        out, lse = QueryChunks.apply(chunks, softmax_scale, q[:, heads], *pages)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 1)


# --- Putting branches and partial results together --------------------------------------------------------------


def combine(gates: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`sum_b gate_b * out_b` (eq. 5). gates [T, Hq, 3] in the order cmp, slc, win; out_* [T, Hq, Dv].

    out         [T, Hq, Dv] of any strides, filled and returned, outside of autograd; None: a new tensor
    """
    dtype = compute_dtype(out_cmp)
    weighted = [gates[..., b, None].to(dtype) * x.to(dtype) for b, x in enumerate((out_cmp, out_slc, out_win))]
    return _result((weighted[0] + weighted[1] + weighted[2]).to(out_cmp.dtype), out)


@torch.no_grad()
def sum_branches(cmp: Tensor, slc: Tensor, win: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`cmp + slc + win`, rounded once to the dtype of `cmp`: the three branches' gradients of q, [T, Hq, Dk].

    Each may have a dtype of its own. out: as in `combine`.
    """
    dtype = compute_dtype(cmp)
    return _result((cmp.to(dtype) + slc.to(dtype) + win.to(dtype)).to(cmp.dtype), out)


@torch.no_grad()
def gate_deltas(
    grad_out: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """`deltas[t, h, b] = sum_d grad_out[t, h, d] * out_b[t, h, d]`: [T, Hq, 3], fp32 or better.

    The gradient of the gates, where grad_out is that of `combine`, and the `delta` of each branch's backward, where
    what the gate multiplies is found again from softmax_lse. out: as in `combine`, [T, Hq, 3].
    """
    dtype = compute_dtype(grad_out)
    deltas = [(grad_out.to(dtype) * x.to(dtype)).sum(-1) for x in (out_cmp, out_slc, out_win)]
    return _result(torch.stack(deltas, -1), out)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys: out_* [T, Hq, Dv], lse_* [T, Hq] (arXiv:1805.02867, 3.1).

    A row that saw no key is (0, -inf) on its side; where neither side saw one the result is (0, -inf) again.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # exp(-inf - -inf) is NaN, in the gradient too: subtract 0 on rows without keys.
    base = lse.masked_fill(lse == -math.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - base)[..., None], torch.exp(lse_b - base)[..., None]
    dtype = compute_dtype(out_a)
    return (weight_a * out_a.to(dtype) + weight_b * out_b.to(dtype)).to(out_a.dtype), lse


# --- Shared pieces ----------------------------------------------------------------------------------------------


def _result(value: Tensor, out: Tensor | None) -> Tensor:
    return value if out is None else out.detach().copy_(value)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: the key-value heads must divide "
            f"the query heads, k and v must have the same rows and heads, q and k the same head dim"
        )
