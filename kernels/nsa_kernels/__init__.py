"""Native Sparse Attention kernels: Triton functions, and in `nsa_kernels.reference` a PyTorch twin of each.

A room for every operator: `phi` (compression), `interval` (attention to [begin, end): the branches cmp and win),
`selection`, `selected` (the branch slc), `gates`, `decode` (new tokens and a paged cache); in each the public face in
one file, plain Triton and Hopper kernels beside it, and `tiles`. `contracts` says how the attention functions are
called, `cpu` is for training without a GPU.

The public names below are imported when they are first used, so that `import nsa_kernels.reference` works, and stays
cheap, where triton is not installed. See kernels/README.md for the mathematics and the measurements.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_kernels.common.tape import Tapes as Tapes
    from nsa_kernels.common.wild import WHOLE_TILES as WHOLE_TILES
    from nsa_kernels.decode.append import decode_append as decode_append
    from nsa_kernels.decode.append import decode_store as decode_store
    from nsa_kernels.decode.attention import decode_append_and_attend as decode_append_and_attend
    from nsa_kernels.decode.attention import decode_attention as decode_attention
    from nsa_kernels.decode.attention import decode_takes as decode_takes
    from nsa_kernels.decode.phi import decode_compress_mean as decode_compress_mean
    from nsa_kernels.decode.phi import decode_compress_mlp as decode_compress_mlp
    from nsa_kernels.decode_part.attention import PartAttention as PartAttention
    from nsa_kernels.decode_part.attention import TokenPartAttention as TokenPartAttention
    from nsa_kernels.decode_part.attention import part_takes as part_takes
    from nsa_kernels.decode_part.store import all_cells as all_cells
    from nsa_kernels.decode_part.store import part_store as part_store
    from nsa_kernels.gates.combine import combine as combine
    from nsa_kernels.gates.deltas import gate_deltas as gate_deltas
    from nsa_kernels.gates.merge import merge as merge
    from nsa_kernels.gates.sums import sum_branches as sum_branches
    from nsa_kernels.interval.attention import compressed_attention as compressed_attention
    from nsa_kernels.interval.attention import compressed_attention_backward as compressed_attention_backward
    from nsa_kernels.interval.attention import window_attention as window_attention
    from nsa_kernels.interval.attention import window_attention_backward as window_attention_backward
    from nsa_kernels.phi.compress import compress_mean as compress_mean
    from nsa_kernels.phi.compress import compress_mlp as compress_mlp
    from nsa_kernels.phi.compress import compress_mlp_pair as compress_mlp_pair
    from nsa_kernels.selected.attention import selected_attention as selected_attention
    from nsa_kernels.selected.attention import selected_attention_backward as selected_attention_backward
    from nsa_kernels.selected.short import ShortRows as ShortRows
    from nsa_kernels.selection.select import select_blocks as select_blocks

# Which module holds each public name. No room has a public name for its own: importing it would hide the function.
_MODULES = {
    "combine": "gates.combine",
    "compress_mean": "phi.compress",
    "compress_mlp": "phi.compress",
    "compress_mlp_pair": "phi.compress",
    "compressed_attention": "interval.attention",
    "compressed_attention_backward": "interval.attention",
    "gate_deltas": "gates.deltas",
    "merge": "gates.merge",
    "select_blocks": "selection.select",
    "selected_attention": "selected.attention",
    "selected_attention_backward": "selected.attention",
    "sum_branches": "gates.sums",
    "window_attention": "interval.attention",
    "window_attention_backward": "interval.attention",
}

# Of these kernels alone: the reference has no tiles and launches nothing; its twins of decoding are in
# `nsa_kernels.reference.decode`, as everything else decodes with the operators of training.
_ALONE = {
    "PartAttention": "decode_part.attention",
    "ShortRows": "selected.short",
    "Tapes": "common.tape",
    "TokenPartAttention": "decode_part.attention",
    "WHOLE_TILES": "common.wild",
    "all_cells": "decode_part.store",
    "decode_append": "decode.append",
    "decode_append_and_attend": "decode.attention",
    "decode_attention": "decode.attention",
    "decode_compress_mean": "decode.phi",
    "decode_compress_mlp": "decode.phi",
    "decode_store": "decode.append",
    "decode_takes": "decode.attention",
    "part_store": "decode_part.store",
    "part_takes": "decode_part.attention",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _ALONE:
        return getattr(import_module(f"{__name__}.{_ALONE[name]}"), name)
    if name not in _MODULES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
