"""Which selected blocks travel: bitmaps tell every owner what to send, pages move in rounds that fit a budget.

Per key-value head a rank marks the global selection blocks its queries chose and it does not hold. Bitmaps are
gathered; their set bits in ascending order are the list of pages on both sides (`cp.sent`), so no index ever travels,
and every rank knows everybody's rounds.

    owner 0 holds blocks 0 1, rank 1 marks 1 1 0 0 for head 0 and 0 1 0 0 for head 1
    rank 1 gets from rank 0  (head 0, block 0) (head 0, block 1) (head 1, block 1)
    with a budget of two pages it gets the first two in round 0 and the third in round 1
"""

import torch
from torch import Tensor

from nsa_dist.cp.layout import RankLayout
from nsa_dist.cp.options import FetchOptions as FetchOptions  # by this name in older checkpoints


def chosen_elsewhere(block_indices: Tensor, layout: RankLayout) -> Tensor:
    """bool [Hkv, num_blocks]: the blocks some query of this rank chose and another rank holds."""
    num_kv_heads, num_blocks = block_indices.shape[1], len(layout.block_owner)
    # One spare column takes the -1 of unused slots.
    marks = torch.zeros(num_kv_heads, num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    ids = block_indices.transpose(0, 1).flatten(1).long()  # [Hkv, T * n]
    marks.scatter_(1, ids.masked_fill(ids < 0, num_blocks), True)
    marks.index_fill_(1, layout.local_blocks, False)  # not marks[:, ...] = False, which copies from the host
    return marks[:, :num_blocks]


def pack_bits(marks: Tensor) -> Tensor:
    """bool [..., B] -> uint8 [..., ceil(B / 8)], eight blocks to the byte."""
    bits = torch.nn.functional.pad(marks, (0, -marks.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    shifts = torch.arange(8, device=marks.device, dtype=torch.uint8)
    return (bits << shifts).sum(-1, dtype=torch.uint8)


def widen_to_whole_shards(wanted: Tensor, fraction: float) -> Tensor:
    """Where at least `fraction` of an owner's blocks of a head are wanted, want all of them: bool [..., own blocks]."""
    if fraction == 1.0:
        return wanted
    return wanted | (wanted.sum(-1, keepdim=True, dtype=torch.float32) / wanted.shape[-1] >= fraction)
