"""Attention in plain PyTorch, every operation in the dtype of its inputs: the yardstick of the twice rule in bf16.

`nsa_kernels.reference` computes bf16 in fp32 and rounds its results once, which no tensor core does: P and dS enter
their products in bf16. Gradients are therefore measured against the errors of PyTorch's own bf16 operations.
"""

import math

import torch
from torch import Tensor


def interval_attention(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *, softmax_scale: float):
    """As `reference.window_attention`, differentiable, (out, softmax_lse): all of the [Hq, T, R] scores at once."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # [Hq, R, D]
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * softmax_scale  # [Hq, T, R]
    row = torch.arange(k.shape[1], device=q.device)
    visible = (row >= begin[:, None]) & (row < end[:, None])  # [T, R]
    scores = scores.masked_fill(~visible, -math.inf)
    empty = ~visible.any(1)[:, None]
    p = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[:, 0], -math.inf)
    return (p @ v).transpose(0, 1), lse.transpose(0, 1)
