"""Tile sizes of the selected branch, and how a call is cut into chunks whose workspace is bounded."""

from collections.abc import Iterator
from dataclasses import dataclass

import triton

# Partial results of one chunk, at most. More chunks cost launches (about 0.1 ms each) and a tail wave per kernel.
WORKSPACE_BYTES = 2 * 2**30


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


def forward_tiles(group: int, head_dim_k: int, head_dim_v: int) -> ForwardTiles:
    least = max(64, triton.next_power_of_2(group))
    return ForwardTiles(least, 2048, 4, 168, least, 4, 168, least, 3, 65536 // group)


def backward_tiles(group: int, head_dim_k: int, head_dim_v: int) -> BackwardTiles:
    least = max(32, triton.next_power_of_2(group))
    return BackwardTiles(least, 4096, 4, 5, None, max(64, least), 3, 2**20)


def chunks(
    num_queries: int, num_kv_heads: int, bytes_per_query: int, limit: int = WORKSPACE_BYTES
) -> Iterator[tuple[slice, slice]]:
    """(queries, key-value heads) of each chunk: as many heads as fit, else one head and as many queries as fit.

    bytes_per_query     workspace of one query and one key-value head
    """
    if num_queries == 0:
        return
    heads = max(1, min(num_kv_heads, limit // max(1, num_queries * bytes_per_query)))
    rows = num_queries
    if num_queries * bytes_per_query > limit:
        rows = max(64, limit // bytes_per_query // 64 * 64)
    for head in range(0, num_kv_heads, heads):
        for first in range(0, num_queries, rows):
            yield slice(first, min(first + rows, num_queries)), slice(head, min(head + heads, num_kv_heads))
