"""Attention and phi in plain PyTorch, all operations in the dtype of the inputs: the yardstick of the twice rule.

`nsa_kernels.reference` computes bf16 in fp32 and rounds its results once, which no tensor core does: P and dS enter
their products in bf16. Gradients are therefore measured against the errors of PyTorch's own bf16 operations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels import reference


def interval_attention(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *, softmax_scale: float):
    """As `reference.window_attention`, differentiable, (out, softmax_lse): all of the [Hq, T, R] scores at once."""
    row = torch.arange(k.shape[0], device=q.device)
    return masked_attention(q, k, v, (row >= begin[:, None]) & (row < end[:, None]), softmax_scale=softmax_scale)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, softmax_scale: float):
    """Attention of each query to what `visible` shows it, bool [T, R] or one for each head [Hq, T, R]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # [Hq, R, D]
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * softmax_scale  # [Hq, T, R]
    scores = scores.masked_fill(~visible, -math.inf)
    empty = ~visible.any(-1)
    p = scores.masked_fill(empty[..., None], 0.0).softmax(-1).masked_fill(empty[..., None], 0.0)
    lse = scores.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -math.inf)
    return (p @ v).transpose(0, 1), lse.transpose(0, 1)


def compress_mlp(x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """As `reference.compress_mlp`, every product and sum in the dtype of x."""
    blocks = reference.gather_blocks(x, block_rows, pos_emb.shape[1]).transpose(1, 2) + pos_emb
    hidden = F.gelu(torch.bmm(blocks.flatten(2).transpose(0, 1), w1), approximate="tanh")
    return torch.bmm(hidden, w2).transpose(0, 1)
