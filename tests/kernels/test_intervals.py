"""Tile by tile, against a look at every pair of a query and a key."""

import pytest
import torch

from nsa_kernels.interval.parts import tile_ranges
from nsa_kernels.interval.unseen import unseen_tiles


@pytest.mark.parametrize("num_queries", [0, 1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("num_keys", [1, 16, 17, 1000])
def test_against_every_pair(num_queries, num_keys, device):
    begin = torch.randint(0, num_keys + 1, (num_queries,), device=device).sort().values.to(torch.int32)
    length = torch.randint(0, 40, (num_queries,), device=device)
    end = torch.maximum(begin, (begin + length).cummax(0).values.clamp(max=num_keys)).to(torch.int32)
    actual = tile_ranges(begin, end, num_keys, 16)
    unseen = unseen_tiles(begin, end, num_keys, 16).tolist()
    key = torch.arange(num_keys, device=device)
    for tile, (first, stop, full, full_stop) in enumerate(actual.T.tolist()):
        keys = key[tile * 16 : (tile + 1) * 16]
        sees = (keys >= begin[:, None]) & (keys < end[:, None])  # [T, keys]
        some, every = sees.any(1), sees.all(1)
        assert unseen[tile] == (not bool(sees.any(0).all()))
        query = torch.arange(num_queries, device=device)
        assert not some[(query < first) | (query >= stop)].any()
        assert every[(query >= full) & (query < full_stop)].all()
        assert not every[(query < full) | (query >= full_stop)].any()
