"""Native Sparse Attention kernels: Triton functions, and in `nsa_kernels.reference` a PyTorch twin of each.

The public names below are imported when they are first used, so that `import nsa_kernels.reference` works, and stays
cheap, where triton is not installed. See kernels/README.md for the mathematics and the measurements.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_kernels.cmp_attention import compressed_attention as compressed_attention
    from nsa_kernels.cmp_backward import compressed_attention_backward as compressed_attention_backward
    from nsa_kernels.compress import compress_mean as compress_mean
    from nsa_kernels.compress import compress_mlp as compress_mlp
    from nsa_kernels.compress import compress_mlp_pair as compress_mlp_pair
    from nsa_kernels.gates import combine as combine
    from nsa_kernels.partials import merge as merge
    from nsa_kernels.select import select_blocks as select_blocks
    from nsa_kernels.slc_attention import selected_attention as selected_attention
    from nsa_kernels.slc_attention import selected_attention_backward as selected_attention_backward
    from nsa_kernels.sums import gate_deltas as gate_deltas
    from nsa_kernels.sums import sum_branches as sum_branches
    from nsa_kernels.wild import WHOLE_TILES as WHOLE_TILES
    from nsa_kernels.win_attention import window_attention as window_attention
    from nsa_kernels.win_attention import window_attention_backward as window_attention_backward

# Which module holds each public name. No module has a public name for its own: importing it would hide the function.
_MODULES = {
    "combine": "gates",
    "compress_mean": "compress",
    "compress_mlp": "compress",
    "compress_mlp_pair": "compress",
    "compressed_attention": "cmp_attention",
    "compressed_attention_backward": "cmp_backward",
    "gate_deltas": "sums",
    "merge": "partials",
    "select_blocks": "select",
    "selected_attention": "slc_attention",
    "selected_attention_backward": "slc_attention",
    "sum_branches": "sums",
    "window_attention": "win_attention",
    "window_attention_backward": "win_attention",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "WHOLE_TILES":  # of these kernels alone: the reference has no tiles
        return import_module(f"{__name__}.wild").WHOLE_TILES
    if name not in _MODULES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
