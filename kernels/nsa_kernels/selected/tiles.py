"""Tile sizes of the selected branch, and how a call is cut into chunks whose workspace is bounded."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.common.device import on_hopper
from nsa_kernels.common.sizes import cdiv, next_power_of_2

# Partial results of one chunk, at most. More chunks cost launches (about 0.1 ms each) and a tail wave per kernel.
WORKSPACE_BYTES = 9 * 2**28


@dataclass(frozen=True)
class ForwardTiles:
    """`rows` (query, head) pairs meet a block at a time; an item is `item_rows` of them, one program's work."""

    rows: int
    item_rows: int
    num_warps: int
    registers: int | None
    shared_rows: int
    shared_warps: int
    shared_registers: int | None
    sum_rows: int
    sum_stages: int
    segment_queries: int


@dataclass(frozen=True)
class BackwardTiles:
    rows: int
    item_rows: int
    num_warps: int
    num_stages: int
    registers: int | None
    sum_rows: int
    sum_stages: int
    segment_queries: int


# Measured on one H200, bf16, D 128, 65,536 tokens, random selections of 16 blocks; ms of the kernel at G = 16 / 4 / 1.
#
# gathered  64 rows, 4 warps, 168 registers (3 programs an SM), queries prefetched       6.8 / 3.5 / 2.0   <- chosen
#           the same without a register limit                                            7.4 at G = 16, before segments
#           128 registers: 4 programs, but spills                                        9.3 / 5.2 / 3.1
#           triton's own pipelining, 3 stages instead of the prefetch                    8.1 / 4.0 / 2.1
#           128 rows, 8 warps: one program an SM                                         12 / 6.2 / 3.2
#           segments of 2**20 / 65536 / 32768 queries over G                             7.4 / 6.8 / 6.9 at G = 16
# shared    64 rows, 4 warps, 168 registers; without limit 3.0, 128 registers 2.9        2.5 / 1.5 / 0.7   <- chosen
#           128 rows, 8 warps                                                            2.9 / 1.5 / 0.9
# sum       64 rows, 3 stages: 4.0 TB/s; 32 or 128 rows, 4 stages: the same              3.8 / 2.0 / 1.0   <- chosen
# items     32 rows, 4 warps, 5 stages (two tiles on their way)                          21.2 / 10.6 / 5.4 <- chosen
#           32 rows, 2 / 3 / 4 / 6 stages                                                25.3 / 24.9 / 24.8 / 21.3
#           64 rows, 2 stages (255 registers, 136 bytes of stack; loads not overlapped)  23.6 / 11.0 / 6.7
#           64 rows, 5 stages: one program an SM                                         53.6 at G = 16
#           64 rows, 8 warps: half the registers each, but P and dS go through memory    33 at G = 16
#           items of 2048 / 8192 rows                                                    +1 / +0.3 at G = 16
# What `hopper_takes` has its own kernels, with items and segments of these sizes:
# docs/decisions/selected-attention-hopper.md.


def forward_tiles(group: int, head_dim_k: int, head_dim_v: int) -> ForwardTiles:
    """The sizes above; a tile holds all heads of a group; wider keys need more registers than three programs have."""
    least = max(64, next_power_of_2(group))
    registers = 168 if least == 64 and head_dim_k <= 128 and head_dim_v <= 128 else None
    return ForwardTiles(
        rows=least,
        item_rows=2048,
        num_warps=4,
        registers=registers,
        shared_rows=least,
        shared_warps=4,
        shared_registers=registers,
        sum_rows=least,
        sum_stages=3,
        segment_queries=max(256, 65536 // group),
    )


def backward_tiles(group: int, head_dim_k: int, head_dim_v: int) -> BackwardTiles:
    """The sizes above. Segments save nothing here, and cost a page of partial sums for each list they cut."""
    least = max(32, next_power_of_2(group))
    return BackwardTiles(
        rows=least,
        item_rows=4096,
        num_warps=4,
        num_stages=5,
        registers=None,
        sum_rows=max(64, least),
        sum_stages=3,
        segment_queries=2**20,
    )


def hopper_takes(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, slc_block_len: int, copied: tuple[Tensor, ...]
) -> bool:
    """Whether `hopper.pages` can copy these by boxes: a Hopper GPU, sizes that fill its tiles, aligned addresses."""
    return (
        on_hopper(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and (q.shape[2], v.shape[2]) in ((64, 64), (128, 128), (192, 128))
        and slc_block_len == 64
        and q.shape[1] // k.shape[1] in (8, 16, 32, 64)
        and block_indices.shape[2] <= 32
        and all(x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in x.stride()[:2]) for x in copied)
    )


def chunks(
    num_queries: int, num_kv_heads: int, bytes_per_query: int, limit: int = WORKSPACE_BYTES
) -> Iterator[tuple[slice, slice]]:
    """(queries, key-value heads) of each chunk: as many heads as fit, else one head and as many queries as fit.

    Chunks are alike, so that none is left over that fills no wave of programs.

    bytes_per_query     workspace of one query and one key-value head
    """
    if num_queries == 0:
        return
    heads = max(1, min(num_kv_heads, limit // max(1, num_queries * bytes_per_query)))
    heads = cdiv(num_kv_heads, cdiv(num_kv_heads, heads))
    rows = num_queries
    if num_queries * bytes_per_query > limit:
        pieces = cdiv(num_queries, max(64, limit // bytes_per_query // 64 * 64))
        rows = cdiv(cdiv(num_queries, pieces), 64) * 64
    for head in range(0, num_kv_heads, heads):
        for first in range(0, num_queries, rows):
            yield slice(first, min(first + rows, num_queries)), slice(head, min(head + heads, num_kv_heads))
