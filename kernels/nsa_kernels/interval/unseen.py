"""Which tiles of keys hold a row that no query sees, where query t sees the rows [begin[t], end[t]).

Such a row may hold anything, NaN included: kernels that copy whole tiles look here whether one has to be blanked.

Shapes      begin, end int32 [T], contiguous, neither decreases
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv


@triton.jit
def _count_up_to(ascending_ptr, limit, length, num_steps):
    """How many of the `length` ascending numbers are <= limit [BLOCK]; 2 ** num_steps > length."""
    low = tl.zeros_like(limit)
    high = low + length
    for _ in range(num_steps):
        middle = (low + high) // 2
        open_ = low < high
        below = open_ & (tl.load(ascending_ptr + middle, mask=open_, other=0) <= limit)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@launchable
@triton.jit
def _unseen_tiles_kernel(
    begin_ptr, end_ptr,
    unseen_ptr,
    num_queries, num_keys, num_tiles, num_steps,
    TILE_LEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tile[:, None] * TILE_LEN + tl.arange(0, TILE_LEN)[None, :]
    # Of the queries that end behind a key, the first begins first.
    query = _count_up_to(end_ptr, key, num_queries, num_steps)
    begin = tl.load(begin_ptr + query, mask=query < num_queries, other=2**31 - 1)
    unseen = (begin > key) & (key < num_keys)
    tl.store(unseen_ptr + tile, tl.max(unseen.to(tl.int32), 1), mask=tile < num_tiles)


def unseen_tiles(begin: Tensor, end: Tensor, num_keys: int, tile_len: int) -> Tensor:
    """int32 [tiles]: 1 where some row of the tile is seen by no query at all, and may hold anything."""
    num_tiles = cdiv(num_keys, tile_len)
    unseen = torch.empty(num_tiles, dtype=torch.int32, device=begin.device)
    if num_tiles:
        block = 8
        _unseen_tiles_kernel[(cdiv(num_tiles, block),)](
            begin, end,
            unseen,
            len(begin), num_keys, num_tiles, len(begin).bit_length(),
            TILE_LEN=tile_len, BLOCK=block,
        )  # fmt: skip
    return unseen
