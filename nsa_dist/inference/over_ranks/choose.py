"""Importance of the selection blocks of one rank (eq. 9, 10), and the n blocks chosen among those of all ranks."""

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.comm import Comm
from nsa_kernels.reference import overlap_weights

_NONE = 2**31 - 1  # in place of a block's id
_MOST = 2**25  # scores at once


def candidates(
    q: Tensor, keys: Tensor, lse: Tensor, blocks: Tensor, num_cmp: Tensor, own_block: Tensor, softmax_scale: float,
    cfg: NSAConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of one sequence and the J selection blocks here, the n best of each query: (importance, id) [T, Hkv, n].

    q           [T, Hq, Dk], of T queries of the sequence
    keys        [J, K, Hkv, Dk], K = (l + l') / d - 1: the compressed keys that share cells with each block, in order
    lse         [T, Hq], merged over ranks
    blocks      int64 [J], ascending
    num_cmp     integer [T]: how many compressed blocks each query sees
    own_block   int64 [T]: the block each query is in

    Forced blocks have an importance of inf, and none -inf and no id.
    """
    per_query = max(1, q.shape[1] * keys.shape[0] * keys.shape[1])
    parts = [
        _best(_importance(queries, statistics, seen, keys, blocks, softmax_scale, cfg), blocks, own, cfg)
        for queries, statistics, seen, own in zip(
            *(x.split(max(1, _MOST // per_query)) for x in (q, lse, num_cmp, own_block)), strict=True
        )
    ]
    values, ids = (torch.cat(x) for x in zip(*parts, strict=True))
    return values, ids


def choose(values: Tensor, ids: Tensor, comm: Comm) -> Tensor:
    """block_indices int64 [T, Hkv, n], ascending, -1 for none, from every rank's candidates: the larger importance
    first, ties to the lower id, as training has them."""
    as_int = torch.int64 if values.dtype == torch.float64 else torch.int32
    gathered = comm.all_gather(torch.stack([values.view(as_int), ids.to(as_int)]), "candidates")
    found, names = (x.movedim(0, -2).flatten(-2) for x in gathered.unbind(1))  # [T, Hkv, P * n]
    names, order = names.sort(-1)
    importance = found.gather(-1, order).view(values.dtype)
    best = importance.sort(dim=-1, descending=True, stable=True).indices[..., : values.shape[-1]]
    chosen = names.gather(-1, best).sort(-1).values
    return chosen.masked_fill(chosen == _NONE, -1).long()


def _importance(
    q: Tensor, lse: Tensor, num_cmp: Tensor, keys: Tensor, blocks: Tensor, softmax_scale: float, cfg: NSAConfig
) -> Tensor:
    """[T, Hkv, J], fp32 or better. Summed in the reference's order, so that what ties there ties here."""
    cells = keys.shape[1]
    weights = overlap_weights(cfg.cmp_block_len, cfg.cmp_stride, cfg.slc_block_len)
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(1, (keys.shape[2], -1))  # [T, Hkv, G, Dk]
    scores = torch.einsum("thgd,nhd->thgn", grouped, keys.flatten(0, 1).to(dtype)) * softmax_scale
    p = torch.exp(scores - lse.to(dtype).unflatten(1, grouped.shape[1:3])[..., None]).unflatten(-1, keys.shape[:2])
    first = blocks * (cfg.slc_block_len // cfg.cmp_stride) + min(weights)
    index = first[:, None] + torch.arange(cells, device=q.device)  # [J, K]
    visible = (index >= 0) & (index < num_cmp[:, None, None])
    p = p.masked_fill(~visible[:, None, None], 0).sum(2)  # [T, Hkv, J, K]
    total = p.new_zeros(p.shape[:3])
    for cell, weight in enumerate(weights.values()):
        total += weight * p[..., cell]
    return total


def _best(importance: Tensor, blocks: Tensor, own_block: Tensor, cfg: NSAConfig) -> tuple[Tensor, Tensor]:
    own, count = own_block[:, None], cfg.num_slc_blocks
    visible = blocks <= own  # [T, J]
    forced = (blocks < cfg.num_init_blocks) | (blocks > own - cfg.num_local_blocks)
    value = importance.masked_fill(forced[:, None], torch.inf).masked_fill(~visible[:, None], -torch.inf)
    best = value.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    named = torch.where(visible, blocks, _NONE)[:, None].expand_as(value)
    missing = (0, count - best.shape[-1])
    return (
        torch.nn.functional.pad(value.gather(-1, best), missing, value=-torch.inf),
        torch.nn.functional.pad(named.gather(-1, best), missing, value=_NONE),
    )
