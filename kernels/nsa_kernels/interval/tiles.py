"""Tile sizes of the interval kernels, chosen by head dims and dtype, each with the measurement that chose it.

The Hopper kernels have one tile each, beside their code.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.sizes import cdiv, split_head_dim

# Key tiles start at multiples of this many rows. Ranks lay the same keys at rows that are congruent modulo 64, so with
# this one number every rank adds up a query's keys in the same tiles, and gets the same bits.
KEY_TILE = 64

# Queries of a span: where a kernel works on some of the queries only, it is told where such pieces begin.
SPAN_QUERIES = 64
SPAN = tl.constexpr(SPAN_QUERIES)


@triton.jit
def rows_of_tile(tile, spans_ptr, num_queries, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first row of a tile and where the rows end that it may write: of all queries, or of its span.

    spans_ptr   the first query of each span of SPAN queries, ascending; None: tiles are those of all queries
    """
    if spans_ptr is None:
        first_row = tile * BLOCK_M
        stop_row = num_queries * G
    else:
        TILES: tl.constexpr = (SPAN * G + BLOCK_M - 1) // BLOCK_M
        span_row = tl.load(spans_ptr + tile // TILES) * G
        first_row = span_row + tile % TILES * BLOCK_M
        stop_row = tl.minimum(span_row + SPAN * G, num_queries * G)
    return first_row, stop_row


def num_tiles(num_queries: int, spans: Tensor | None, group: int, block_m: int) -> int:
    """Tiles of `block_m` (query, head) rows: of all queries, or of each of the `spans` by itself."""
    if spans is None:
        return cdiv(num_queries * group, block_m)
    return len(spans) * cdiv(SPAN_QUERIES * group, block_m)


@dataclass(frozen=True)
class Tile:
    """`block_m` (query, head) rows are worked on by `num_warps` warps, loads run `num_stages` tiles ahead."""

    block_m: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread, where one program more fits an SM with fewer

    def launch(self) -> dict[str, int | None]:
        """The keyword arguments of a kernel launch."""
        return {
            "BLOCK_M": self.block_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.maxnreg,
        }


@dataclass(frozen=True)
class WindowTiles:
    forward: Tile
    queries: Tile  # dQ


def window_tiles(dim_k: int, itemsize: int) -> WindowTiles:
    """The tiles for a head dim of q and k (Dv is never larger), and a dtype of `itemsize` bytes.

    Milliseconds on one H200: bf16, D 128, 64k tokens, a window of 512, Hq 64 / Hkv 4, then Hq 16 / Hkv 16.
    """
    if itemsize == 4:  # fp32 is for checking, not for speed: what fits in shared memory at any head dim
        return WindowTiles(Tile(64, 4, 1), Tile(32, 4, 1))
    if dim_k > 128:  # checked, not timed one by one
        return WindowTiles(Tile(128, 8, 2), Tile(128, 8, 2))
    return WindowTiles(
        # 3.07, 0.90. 212 registers in place of 128 leave room for one program an SM: 3.74, 1.12. 64 rows: 3.48, 0.95
        forward=Tile(128, 8, 2, maxnreg=128),
        # 4.15, 1.11. 128 rows and 8 warps: 4.24, 1.33; one stage: 4.98
        queries=Tile(64, 4, 2),
    )


def window_dims(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int | str]:
    """The constexprs that the two kernels of the window share."""
    dk, dk_tail = split_head_dim(q.shape[2])
    group = q.shape[1] // k.shape[1]
    # fp32 in full precision; 16-bit inputs have one way only.
    return {"G": group, "DK": dk, "DK_TAIL": dk_tail, "DV": v.shape[2], "BLOCK_N": KEY_TILE, "PRECISION": "ieee"}


def cmp_forward_tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """H200, bf16, 65,536 tokens, D 128, ms for (Hq, Hkv) = (64, 4).

    BLOCK_M, BLOCK_N, warps, stages: 128, 64, 8, 2 in 128 registers, so that two tiles share a multiprocessor, 9.4;
    64, 64, 4, 3 10.0; 128, 128, 8, 2 9.9; with pointers in place of the copy engine 9.9 to 10.9.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if head_dim <= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def cmp_grad_q_tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """H200, bf16, 65,536 tokens, D 128, ms for (Hq, Hkv) = (64, 4), this kernel alone, twice in a row.

    BLOCK_M, BLOCK_N, warps, stages: 64, 64, 4, 2, of which two share a multiprocessor, 10.7 (615 TFLOP/s);
    128, 64, 8, 3 11.8; 128, 128, 8, 2 12.1; 128, 64, 8, 2 12.7.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if head_dim <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def grad_kv_tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """As above: 64, 64, 4, 2 19.4 (453 TFLOP/s); 64, 128, 8, 2 23.2; 64, 128, 8, 3 25.6.

    dK and dV by kernels of their own, S computed twice: 17.9 + 13.4 at best.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if head_dim <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
