"""Wild rows, with NaN or infinity in them, in tiles where some (query, key) pairs are not seen.

A pair that is not seen has weight 0 in a product with such a row, and 0 * NaN is NaN. So in the tiles that hold such
pairs a wild row of an operand is made 0, and the weights of the pairs that do see it are made NaN: it reaches those,
and no others. Tiles in which all is seen, nearly all of them, need nothing.
"""

import triton
import triton.language as tl


@triton.jit
def wild_rows(x):
    """Which rows of x [ROWS, D] hold NaN or infinity, [ROWS]."""
    return tl.min((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32), 1) == 0


@triton.jit
def tamed(x):
    """x [ROWS, D], its wild rows made 0."""
    return tl.where(wild_rows(x)[:, None], 0.0, x).to(x.dtype)
