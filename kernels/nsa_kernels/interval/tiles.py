"""Tile sizes of the window kernels: one table, chosen by head dims, with the measurement beside each row."""

from dataclasses import dataclass

from torch import Tensor

# Key tiles start at multiples of this many rows. Ranks lay the same keys at rows that are congruent modulo 64, so with
# this one number every rank adds up a query's keys in the same tiles, and gets the same bits.
KEY_TILE = 64


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


def split_head_dim(dim: int) -> tuple[int, int]:
    """A head dim as two tile widths, a power of two and a smaller one or 0: 192 is (128, 64)."""
    main = 1 << (dim.bit_length() - 1)
    return main, dim - main


def kernel_dims(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int | str]:
    """The constexprs that the two kernels share."""
    dk, dk_tail = split_head_dim(q.shape[2])
    group = q.shape[1] // k.shape[1]
    # fp32 in full precision; 16-bit inputs have one way only.
    return {"G": group, "DK": dk, "DK_TAIL": dk_tail, "DV": v.shape[2], "BLOCK_N": KEY_TILE, "PRECISION": "ieee"}
