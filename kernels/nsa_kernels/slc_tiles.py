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
    num_stages: int
    finish_rows: int
    finish_warps: int
    finish_stages: int


@dataclass(frozen=True)
class BackwardTiles:
    rows: int
    item_rows: int
    num_warps: int
    num_stages: int
    sum_rows: int


def forward_tiles(group: int, head_dim_k: int, head_dim_v: int) -> ForwardTiles:
    least = triton.next_power_of_2(group)
    return ForwardTiles(max(64, least), 1024, 4, 3, max(64, least), 4, 3)


def backward_tiles(group: int, head_dim_k: int, head_dim_v: int) -> BackwardTiles:
    least = triton.next_power_of_2(group)
    return BackwardTiles(max(64, least), 4096, 4, 2, max(64, least))


def chunks(
    num_queries: int, num_kv_heads: int, bytes_per_query: int, limit: int = WORKSPACE_BYTES
) -> Iterator[tuple[slice, slice]]:
    """(queries, key-value heads) of each chunk: as many heads as fit, else one head and as many queries as fit.

    bytes_per_query     workspace of one query and one key-value head
    """
    heads = max(1, min(num_kv_heads, limit // max(1, num_queries * bytes_per_query)))
    rows = num_queries
    if num_queries * bytes_per_query > limit:
        rows = max(64, limit // bytes_per_query // 64 * 64)
    for head in range(0, num_kv_heads, heads):
        for first in range(0, num_queries, rows):
            yield slice(first, min(first + rows, num_queries)), slice(head, min(head + heads, num_kv_heads))
