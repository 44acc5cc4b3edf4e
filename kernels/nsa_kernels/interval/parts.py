"""Work of the kernels that own key tiles of compressed attention: the rows that see each, in how many parts; their sum.

There are T / 16 keys and G heads to a key-value head, so a key tile is seen by many rows and there are few key tiles:
the rows of each are cut into `num_splits` equal parts, whose partial dK, dV are fp32 and are added up in order, so two
runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2

BLOCK = 1024


@launchable
@triton.jit
def _tile_ranges_kernel(
    begin_ptr, end_ptr,
    out_ptr,
    num_queries, num_keys, num_tiles, num_steps,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row s of `out`: the first query whose end (s = 0, 2) or begin (s = 1, 3) is above a bound, by bisection."""
    search = tl.arange(0, 4)[:, None]
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    last_key = tl.minimum((tile + 1) * BLOCK_N, num_keys) - 1
    bound = tl.where((search == 0) | (search == 3), tile * BLOCK_N, last_key)
    of_end = search % 2 == 0
    low = tl.zeros([4, BLOCK], tl.int32)
    high = tl.full([4, BLOCK], 0, tl.int32) + num_queries
    # AMD's compiler takes neither addresses in a `while`, nor a tile of those of two tensors.
    for _ in range(num_steps):
        searching = low < high
        middle = low + (high - low) // 2
        end = tl.load(end_ptr + middle, mask=searching & of_end, other=0)
        begin = tl.load(begin_ptr + middle, mask=searching & (of_end == 0), other=0)
        above = tl.where(of_end, end, begin) > bound
        high = tl.where(searching & above, middle, high)
        low = tl.where(searching & (above == 0), middle + 1, low)
    tl.store(out_ptr + search * num_tiles + tile, low, mask=tile < num_tiles)


def tile_ranges(begin: Tensor, end: Tensor, num_keys: int, block_n: int) -> Tensor:
    """Which queries see each tile of `block_n` keys: int32 [4, tiles], seen_from, seen_to, full_from, full_to.

    Queries [seen_from, seen_to) see some key of the tile, [full_from, full_to) all of them. For 4 queries with
    begin = 0, end = 0, 1, 2, 3 and tiles of 2 keys, three keys in all: 1, 4, 2, 4 and 3, 4, 3, 4.
    """
    num_tiles = cdiv(num_keys, block_n)
    out = torch.empty(4, num_tiles, dtype=torch.int32, device=begin.device)
    _tile_ranges_kernel[(cdiv(num_tiles, 32),)](
        begin, end,
        out,
        begin.shape[0], num_keys, num_tiles, begin.shape[0].bit_length(),
        BLOCK_N=block_n, BLOCK=32,
    )  # fmt: skip
    return out


def num_splits(num_items: int) -> int:
    """Parts per key tile: at least four work items for each of 132 multiprocessors, but 16 parts at most."""
    return max(1, min(16, next_power_of_2(cdiv(4 * 132, num_items))))


@launchable
@triton.jit
def _sum_kernel(k_parts_ptr, v_parts_ptr, k_ptr, v_ptr, k_size, v_size, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    of_k = tl.program_id(1) == 0
    parts_ptr = tl.where(of_k, k_parts_ptr, v_parts_ptr)
    out_ptr = tl.where(of_k, k_ptr, v_ptr)
    size = tl.where(of_k, k_size, v_size)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += tl.load(parts_ptr + part * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


def sum_parts(k_parts: Tensor, v_parts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sums over the first dim of two contiguous fp32 tensors, in order, rounded once."""
    k, v = (torch.empty(parts.shape[1:], dtype=dtype, device=parts.device) for parts in (k_parts, v_parts))
    _sum_kernel[(cdiv(max(k.numel(), v.numel()), BLOCK), 2)](
        k_parts, v_parts,
        k, v,
        k.numel(), v.numel(),
        NUM_PARTS=k_parts.shape[0], BLOCK=BLOCK,
    )  # fmt: skip
    return k, v
