"""Tile sizes of the compression's kernels."""

from typing import Any

import torch

MEAN_ROWS = 32  # of the kernels of the mean, which only move bytes


def mlp_tile(dtype: torch.dtype) -> dict[str, Any]:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "PRECISION": "ieee", "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "PRECISION": "tf32", "num_warps": 4, "num_stages": 3}
