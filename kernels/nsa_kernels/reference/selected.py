"""Attention to the selected blocks (section 3.3.2)."""

import torch
from torch import Tensor

from nsa_kernels import contracts
from nsa_kernels.contracts import SelectedCall, Upstream, meets
from nsa_kernels.reference.chunks import QueryChunks, chunk_gradients, head_pages, selected_chunks, wide_zeros
from nsa_kernels.reference.gradients import gradients_of_parts


@meets(contracts.selected_attention)
def selected_attention(call: SelectedCall) -> tuple[Tensor, Tensor]:
    q, k, v, k_remote, v_remote, block_indices, block_table, position, slc_block_len, softmax_scale = call
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


@meets(contracts.selected_attention_backward)
@torch.no_grad()
def selected_attention_backward(
    upstream: Upstream, call: SelectedCall, dtype: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    q, k, v, k_remote, v_remote, block_indices, block_table, position, slc_block_len, softmax_scale = call
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (wide_zeros(x) for x in (q, k, v))
    dk_remote, dv_remote = (None if x is None else wide_zeros(x) for x in (k_remote, v_remote))
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        of_part, of_rows = gradients_of_parts(upstream.of_heads(heads))
        pages = head_pages(head, k, v, k_remote, v_remote)
        chunks = selected_chunks(block_indices[:, head], block_table[head], position, slc_block_len, group)
        queries = q[:, heads]
        dq[:, heads], *page_grads = chunk_gradients(
            chunks, softmax_scale, of_part, [queries, *of_rows], queries, *pages
        )
        for local, remote, grad in zip((dk, dv), (dk_remote, dv_remote), page_grads, strict=True):
            local[:, head] = grad[: len(k), 0]
            if remote is not None:
                remote += grad[len(k) :, 0].unflatten(0, remote.shape[:2])
    pairs = ((dq, q), (dk, k), (dv, v), (dk_remote, k_remote), (dv_remote, v_remote))
    return tuple(None if g is None or x is None else g.to(dtype or x.dtype) for g, x in pairs)
