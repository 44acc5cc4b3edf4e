"""The whole layer on one device with given blocks: the truth in fp32 or fp64, and what plain PyTorch makes of it."""

import math
from unittest import mock

import torch
from torch import Tensor

from kernels.plain import compress_mlp
from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.compress import CompressMLP
from nsa_dist.cp.layout import rank_layout
from nsa_kernels import reference
from nsa_kernels.reference import chunks as reference_chunks


def truth(leaves, phis, weight, block_indices, cfg: NSAConfig, bounds: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out and the gradients of q, six of K/V and the gates, by the reference in `dtype`.

    leaves          q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates of the whole sequence
    block_indices   what `nsa_attention` chose for them
    """
    return _layer(leaves, phis, weight, block_indices, cfg, bounds, dtype, reference.compress_mlp)


def plain(leaves, phis, weight, block_indices, cfg: NSAConfig, bounds: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same with every operation in `dtype`, scores and softmax included; only sums over chunks are in fp32."""
    with mock.patch.object(reference_chunks, "softmax_attention", _plain_attention):
        return _layer(leaves, phis, weight, block_indices, cfg, bounds, dtype, compress_mlp)


def _layer(leaves, phis: list[CompressMLP], weight, block_indices, cfg, bounds, dtype, mlp) -> list[Tensor]:
    plan = ShardPlan.contiguous(bounds, 1, cfg.slc_block_len)
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (plan.shard(x, 0) for x in leaves)
    ids = (plan.shard(block_indices + 1, 0) - 1).to(torch.int32)
    layout, scale = rank_layout(plan, cfg, 0, q.device), {"softmax_scale": q.shape[2] ** -0.5}
    compressed = [
        mlp(x, layout.cmp_rows, *(p.detach().to(dtype) for p in (phi.pos_emb, phi.w1, phi.w2)))
        for x, phi in zip((k_cmp, v_cmp), phis, strict=True)
    ]
    table = torch.arange(plan.num_blocks, dtype=torch.int32, device=q.device).expand(k_slc.shape[1], -1)
    outs = (
        reference.compressed_attention(q, *compressed, layout.cmp_begin, layout.cmp_end, **scale)[0],
        reference.selected_attention(
            q, k_slc, v_slc, ids, table, layout.position, slc_block_len=cfg.slc_block_len, **scale
        )[0],
        reference.window_attention(q, k_win, v_win, layout.win_begin, layout.win_end, **scale)[0],
    )
    out = plan.unshard([reference.combine(gates, *outs)])
    grads = torch.autograd.grad(out, leaves, weight.to(dtype))
    return [out.detach(), *grads]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """As `reference_chunks.softmax_attention`, in the dtype of q; softmax_lse, which nobody reads here, is 0."""
    num_rows, num_kv_heads = len(q), k.shape[1]
    grouped = q.unflatten(1, (num_kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)  # [Hkv, C * G, Dk]
    scores = (torch.bmm(grouped, k.permute(1, 2, 0)) * softmax_scale).unflatten(1, (num_rows, -1))
    empty = ~visible.any(1)[:, None, None]
    weight = scores.masked_fill(~visible[:, None], -math.inf).masked_fill(empty, 0.0).softmax(-1)
    weight = weight.masked_fill(empty, 0.0)  # [Hkv, C, G, K]
    out = torch.bmm(weight.flatten(1, 2), v.transpose(0, 1)).unflatten(1, (num_rows, -1))
    return out.transpose(0, 1).flatten(1, 2), q.new_zeros(q.shape[:2])
