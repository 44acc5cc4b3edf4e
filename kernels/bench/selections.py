"""Selections to time the selected branch with: the forced blocks, and earlier ones drawn without regard to content.

A draw never takes a block the query may not see: a benchmark that draws future blocks and masks them does half the
work. Two kinds, because their memory traffic differs:
    random          every query and key-value head draws its own blocks; neighbours share the forced ones only
    correlated      the queries of a block start from common draws, and each replaces a share of them by its own
"""

import torch
from torch import Tensor


def draw_selection(
    num_queries: int,
    num_kv_heads: int,
    *,
    slots: int = 16,
    block_len: int = 64,
    own_share: float = 1.0,
    device: torch.device | str = "cuda",
    seed: int = 0,
) -> Tensor:
    """block_indices int32 [T, Hkv, slots] of one document of `num_queries` tokens, ascending, -1 last.

    own_share   share of a query's free draws that are its own: 1 is random, 0.2 a strongly correlated selection
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    free = slots - 3  # besides the first block, the query's own and the one before
    token = torch.arange(num_queries, device=device)
    own = token // block_len
    earlier = (own - 2).clamp(min=0)  # candidates: blocks 1 .. own - 2
    shape = (num_queries, num_kv_heads, free)
    common = torch.rand(num_queries // block_len + 1, *shape[1:], device=device, generator=generator)[own]
    mine = torch.rand(shape, device=device, generator=generator)
    replaced = torch.rand(shape, device=device, generator=generator) < own_share
    unit = torch.where(replaced, mine, common)
    # Sorted draws from `earlier - free + 1` places, the i-th moved up by i, are distinct blocks.
    places = (earlier - free + 1).clamp(min=1)[:, None, None]
    picked = (unit * places).long().clamp(max=places - 1).sort(-1).values + torch.arange(1, free + 1, device=device)
    picked = picked.masked_fill(picked > earlier[:, None, None], -1)
    forced = torch.stack([torch.zeros_like(own), own - 1, own], 1)
    forced[:, 1].masked_fill_(own < 2, -1)
    forced[:, 2].masked_fill_(own < 1, -1)
    ids = torch.cat([picked, forced[:, None].expand(-1, num_kv_heads, -1)], -1)
    last = 2**30
    ids = ids.masked_fill(ids < 0, last).sort(-1).values
    return ids.masked_fill(ids == last, -1).to(torch.int32)
