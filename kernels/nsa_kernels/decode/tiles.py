"""Tile sizes of decoding, chosen by shapes alone: never by lengths, so that a captured graph stays valid."""

from typing import Any, NamedTuple

import torch

from nsa_kernels.common.sizes import cdiv, next_power_of_2

# Measured on one H200, bf16, Hq 64, Hkv 4, D 128, 64k tokens of each sequence, us of the kernel at batch 64 / 8.

# Compressed rows of a tile. 128: 163 / 28; 64, two stages of copies more: 178 / 34.
TILE_CELLS = 128
# Tiles of one program, the largest number with which there are ENOUGH_SPLITS programs. Batch 64: 8 tiles 157, 4 163, 2
# 175, 1 231. Batch 8: 4 tiles 28, 2 31, 1 35; 3, all programs on the card at once, as 4.
SPLIT_TILES = (8, 4, 2, 1)
ENOUGH_SPLITS = 256
AT_ONCE = 264  # two programs on each of 132 multiprocessors
# Selection blocks whose candidates one program finds. The second and third launch together, with 1 warp in the second:
# 128 76 / 21.4, 64 77 / 21.5, 32 83 / 24.1. 512: candidates alone 66 instead of 27.
CHUNK_BLOCKS = 64
# Warps of a program of the second launch: those of candidates up to FEW_QUERIES, batch 1 5.2 instead of 5.8; of more
# queries those of merging, batch 64 20 instead of 32.
CANDIDATE_WARPS = 2
MERGE_WARPS = 1
FEW_QUERIES = 16
# Sorted side by side when the best of all are found, in up to CANDIDATE_ROWS rows where there are few queries, and one
# where there are many: batch 64 57 with 4 rows, 41 with 1; batch 1 11.7 and 12.7.
CANDIDATES = 128
CANDIDATE_ROWS = 4
# More have 4 warps in the third launch, as many or fewer 8: batch 8 14.4 instead of 15.2, batch 1 9.5 instead of 11.8.
MANY_QUERIES = 64
# Of selected attention. Batch 64: 8 blocks a program 43, 4 52. Batch 8: 8 blocks 21, 4 15.7, 2 15.3, 1 19.
ENOUGH_PROGRAMS = 256
ENOUGH_OF_WINDOW = 128  # the same of the window. The first launch, batch 64: 4 blocks 168, 8 176; batch 8: 4 35, 2 33
MOST_ROWS = 64  # (token, head) rows of a tile


class Split(NamedTuple):
    """How the pages of a sequence are cut for compressed attention."""

    tile_pages: int
    split_pages: int  # a multiple of tile_pages
    num_splits: int


def split(batch: int, num_kv_heads: int, max_pages: int, cells_slc: int) -> Split:
    """Short splits where there are few sequences, so that they fill the card."""
    tile_pages = max(1, TILE_CELLS // next_power_of_2(cells_slc))
    for tiles in SPLIT_TILES:
        num_splits = cdiv(max_pages, tile_pages * tiles)
        if batch * num_kv_heads * num_splits >= ENOUGH_SPLITS or tiles == SPLIT_TILES[-1]:
            break
    return Split(tile_pages, tile_pages * tiles, num_splits)


def reads_pages_ahead(heads: int, cut: Split) -> bool:
    """Whether programs of one tile ask for its pages before they know the sequence's length. It takes 255 registers
    instead of 168, with which two programs are on a multiprocessor and not three. heads: of all sequences."""
    return cut.split_pages == cut.tile_pages and heads * cut.num_splits <= AT_ONCE


def block_rows(num_rows: int) -> int:
    """Of `num_rows` (token, head) rows that share keys, those of a tile; a dot takes 16 at least."""
    return max(16, min(MOST_ROWS, next_power_of_2(num_rows)))


def compressed_options(dtype: torch.dtype, block_m: int) -> dict[str, Any]:
    """Three stages: batch 64 176 instead of 168, 8 33.8 instead of 31.5; of fp32 they do not fit."""
    return {"num_warps": 8 if block_m == MOST_ROWS else 4, "num_stages": 2}


def blocks_of_part(queries: int, num_slc_blocks: int) -> int:
    """Blocks, of 64 tokens say, that one program of selected attention takes in turn.

    queries     sequences * new tokens * key-value heads
    """
    for blocks in (8, 4, 2):
        if queries * cdiv(num_slc_blocks, blocks) >= ENOUGH_PROGRAMS:
            return blocks
    return 1


def window_blocks(queries: int, num_blocks: int) -> int:
    """Of the `num_blocks` of a window, those that one program takes in turn."""
    for blocks in (4, 2):
        if queries * cdiv(num_blocks, blocks) >= ENOUGH_OF_WINDOW:
            return blocks
    return 1


def candidate_rows(queries: int, count: int, most: int) -> int:
    """Rows of `most` in which `count` candidates are sorted, so many at once."""
    return 1 if queries > MANY_QUERIES else min(CANDIDATE_ROWS, next_power_of_2(cdiv(count, most)))


def value_tiles(queries: int, dim_v: int) -> int:
    """Tiles of values, with programs of their own in the third launch."""
    return 2 if queries <= FEW_QUERIES and dim_v % 32 == 0 else 1


def second_warps(queries: int) -> int:
    return CANDIDATE_WARPS if queries <= FEW_QUERIES else MERGE_WARPS


def chosen_options(dtype: torch.dtype) -> dict[str, Any]:
    """Of selected attention that reads pages as it goes, in `decode_part`."""
    return {"num_warps": 4, "num_stages": 2 if dtype == torch.float32 else 3}


def third_options(dtype: torch.dtype, queries: int) -> dict[str, Any]:
    return {"num_warps": 4 if queries > MANY_QUERIES else 8, "num_stages": 2}
