"""Tile sizes of the selection's plain kernels, with the measurements that chose them.

The Hopper kernel has one tile, beside its code.
"""

import torch

from nsa_kernels.common.device import backend
from nsa_kernels.common.sizes import next_power_of_2


def importance_tile(dtype: torch.dtype, group_pad: int) -> dict[str, int]:
    """Rows of a tile are BLOCK_Q * group_pad, keys BLOCK_J * S = 128.

    H200, bf16, 65,536 tokens, D 128, ms for (Hq, Hkv) = (64, 4), (32, 8), (16, 16), rows, warps, stages:
    128, 8, 2 5.9, 3.3, 3.9;  128, 4, 2 6.0, 3.6, 2.5;  64, 4, 2 7.2, 4.1, 3.0;  128, 8, 3 7.8, 4.5, 2.8.
    """
    if dtype == torch.float32:
        return {"BLOCK_Q": max(1, 32 // group_pad), "num_warps": 4, "num_stages": 2}
    if backend() != "cuda":  # an AMD GPU's 64 KB: 128 rows and two stages take 96
        return {"BLOCK_Q": max(1, 64 // group_pad), "num_warps": 4, "num_stages": 1}
    return {"BLOCK_Q": 128 // group_pad, "num_warps": 8 if group_pad > 2 else 4, "num_stages": 2}


def top_tile(num_blocks: int, chosen_pad: int, on_gpu: bool) -> dict[str, int]:
    """NUM_BUNDLES * BUNDLE blocks are looked at together, by one warp. The interpreter's time goes by programs.

    H200, 65,536 tokens, ms for 4, 8, 16 key-value heads: 64 * 4 0.78, -, 3.1;  128 * 4 0.88, 1.8, 3.5;
    64 * 8 1.04, 2.1, 4.2;  two queries to a warp 1.1. Sorting all blocks, 128 at a time: 1.7; 512 at a time: 3.6.
    """
    num_bundles = max(chosen_pad, min(64, next_power_of_2(max(1, num_blocks // 4))))
    return {"BLOCK_Q": 1 if on_gpu else 64, "NUM_BUNDLES": num_bundles, "BUNDLE": 4, "num_warps": 1}
