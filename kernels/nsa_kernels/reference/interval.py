"""Attention over one interval of keys per query: the compressed (section 3.3.1) and the window branch (3.3.3)."""

import torch
from torch import Tensor

from nsa_kernels import contracts
from nsa_kernels.contracts import IntervalCall, Upstream, meets
from nsa_kernels.reference.chunks import QueryChunks, chunk_gradients, interval_chunks
from nsa_kernels.reference.gradients import gradients_of_parts


@meets(contracts.interval_attention)
def compressed_attention(call: IntervalCall) -> tuple[Tensor, Tensor]:
    return _attend(call)


@meets(contracts.interval_attention)
def window_attention(call: IntervalCall) -> tuple[Tensor, Tensor]:
    return _attend(call)


@meets(contracts.interval_attention_backward)
@torch.no_grad()
def compressed_attention_backward(
    upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(upstream, call, kv_dtype)


@meets(contracts.interval_attention_backward)
@torch.no_grad()
def window_attention_backward(
    upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(upstream, call, kv_dtype)


def _attend(call: IntervalCall) -> tuple[Tensor, Tensor]:
    q, k, v, begin, end, softmax_scale = call
    return QueryChunks.apply(interval_chunks(begin, end, q.shape[1]), softmax_scale, q, k, v)


def _gradients(upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, begin, end, softmax_scale = call
    of_part, of_rows = gradients_of_parts(upstream)
    chunks = interval_chunks(begin, end, q.shape[1])
    dq, dk, dv = chunk_gradients(chunks, softmax_scale, of_part, [q, *of_rows], q, k, v)
    return dq.to(q.dtype), dk.to(kv_dtype or k.dtype), dv.to(kv_dtype or v.dtype)
