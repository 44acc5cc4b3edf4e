"""Which functions do the work of a call, and where they want documents to lie."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig


def default_ops(q: Tensor) -> ModuleType:
    return ops_for(q.device, q.dtype)


def ops_for(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Of queries: the Triton kernels on a GPU, ATen's attention on a CPU; the reference for fp64 and other devices."""
    if device.type == "cuda" and dtype != torch.float64:
        import nsa_kernels

        return nsa_kernels
    from nsa_kernels import cpu, reference

    return cpu if device.type == "cpu" and dtype != torch.float64 else reference


class Tiles(NamedTuple):
    """How documents are kept out of each other's tiles, so that NaN in one reaches no other."""

    key_alignment: int  # of the compressed rows of each document
    options: dict[str, bool]  # of the attention of intervals

    @classmethod
    def of(cls, ops: ModuleType, group: int, cfg: NSAConfig, num_documents: int) -> "Tiles":
        """`ops.WHOLE_TILES` says where its kernels want documents to begin, if they want them anywhere."""
        if not hasattr(ops, "WHOLE_TILES"):
            return cls(1, {})
        if num_documents == 1:
            return cls(1, {"aligned": True})
        # In queries and in rows of the window, documents begin at multiples of a selection block.
        query_rows = cfg.slc_block_len * group
        if query_rows % ops.WHOLE_TILES.query_rows or cfg.slc_block_len % ops.WHOLE_TILES.key_rows:
            return cls(1, {"aligned": False})
        return cls(ops.WHOLE_TILES.compressed_rows, {"aligned": True})
