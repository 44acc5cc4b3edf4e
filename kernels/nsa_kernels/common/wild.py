"""Wild rows, with NaN or infinity in them, in tiles where some (query, key) pairs are not seen.

A pair that is not seen has weight 0 in a product with such a row, and 0 * NaN is NaN. Documents are kept out of each
other's way in one of two manners:

- They begin where tiles do, `WHOLE_TILES`: then no tile holds two of them. That costs nothing.
- Elsewhere plain kernels are compiled with APART: where a tile holds pairs that are not seen, a wild row of an operand
  is made 0, and the weights of the pairs that do see it are made NaN: it reaches those, and no others. At 192 / 128,
  65,536 tokens, 16 documents, one H200: forward 25.7 -> 27.8 ms, backward 82 -> 85 for the whole attention.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class WholeTiles(NamedTuple):
    """Multiples at which documents are to begin, so that no tile of any kernel for intervals holds two of them."""

    query_rows: int  # (query, head) rows of a group
    key_rows: int  # rows of the window's keys
    compressed_rows: int  # of compressed keys


WHOLE_TILES = WholeTiles(query_rows=128, key_rows=64, compressed_rows=128)


@triton.jit
def wild_rows(x):
    """Which rows of x [ROWS, D] hold NaN or infinity, [ROWS]."""
    return tl.min((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32), 1) == 0


@triton.jit
def tamed(x):
    """x [ROWS, D], its wild rows made 0."""
    return tl.where(wild_rows(x)[:, None], 0.0, x).to(x.dtype)
