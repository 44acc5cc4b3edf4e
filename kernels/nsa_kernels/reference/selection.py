"""Importance and selection (section 3.3.2, eq. 8 to 12)."""

import math

import torch
from torch import Tensor

from nsa_kernels import contracts
from nsa_kernels.contracts import SelectionCall, meets
from nsa_kernels.reference.chunks import compute_dtype, interval_spans, outside_autocast


def overlap_weights(cmp_block_len: int, cmp_stride: int, slc_block_len: int) -> dict[int, int]:
    """`w(i - j * l'/d)`: how many stride-sized cells compressed block i shares with selection block j (eq. 9).

    >>> overlap_weights(32, 16, 64)
    {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}
    """
    cells_per_cmp, cells_per_slc = cmp_block_len // cmp_stride, slc_block_len // cmp_stride
    return {k: min(k + cells_per_cmp, cells_per_slc) - max(k, 0) for k in range(1 - cells_per_cmp, cells_per_slc)}


@meets(contracts.select_blocks)
@torch.no_grad()
def select_blocks(call: SelectionCall) -> Tensor:
    q, k_cmp, lse_cmp, cmp_begin, cmp_end, position, doc_start, softmax_scale, *_ = call
    slc_block_len, num_slc_blocks = call.slc_block_len, call.num_slc_blocks
    num_queries, num_q_heads = q.shape[:2]
    out = torch.full((num_queries, k_cmp.shape[1], num_slc_blocks), -1, dtype=torch.int32, device=q.device)
    own_block = torch.div(position - doc_start, slc_block_len, rounding_mode="floor").long()  # [T], < 0 for padding
    first_block = torch.div(doc_start, slc_block_len, rounding_mode="floor").long()
    weights = overlap_weights(call.cmp_block_len, call.cmp_stride, slc_block_len)
    for rows, keys in interval_spans(cmp_begin, cmp_end, num_q_heads):
        own = own_block[rows, None]  # [C, 1]
        num_blocks = int(own.max()) + 1
        if num_blocks <= 0:
            continue
        begin, end = (t[rows].long() - keys.start for t in (cmp_begin, cmp_end))
        p = _group_probabilities(q[rows], k_cmp[keys], lse_cmp[rows], begin, end, softmax_scale)  # [C, Hkv, K]
        imp = _importance(p, begin, end, num_blocks, slc_block_len // call.cmp_stride, weights)  # [C, Hkv, J]
        j = torch.arange(num_blocks, device=q.device)
        visible = j <= own  # [C, J]
        forced = (j < call.num_init_blocks) | (j > own - call.num_local_blocks)
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
