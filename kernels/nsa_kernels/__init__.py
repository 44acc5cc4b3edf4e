"""Native Sparse Attention kernels: Triton functions, and in `nsa_kernels.reference` a PyTorch twin of each.

The public names below are imported when they are first used, so that `import nsa_kernels.reference` works, and stays
cheap, where triton is not installed. See kernels/README.md for the mathematics and the measurements.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_kernels.common.wild import WHOLE_TILES as WHOLE_TILES
    from nsa_kernels.gates.combine import combine as combine
    from nsa_kernels.gates.merge import merge as merge
    from nsa_kernels.gates.sums import gate_deltas as gate_deltas
    from nsa_kernels.gates.sums import sum_branches as sum_branches
    from nsa_kernels.interval.attention import compressed_attention_backward as compressed_attention_backward
    from nsa_kernels.interval.cmp_forward import compressed_attention as compressed_attention
    from nsa_kernels.interval.win_forward import window_attention as window_attention
    from nsa_kernels.interval.win_forward import window_attention_backward as window_attention_backward
    from nsa_kernels.phi.compress import compress_mean as compress_mean
    from nsa_kernels.phi.compress import compress_mlp as compress_mlp
    from nsa_kernels.phi.compress import compress_mlp_pair as compress_mlp_pair
    from nsa_kernels.selected.attention import selected_attention as selected_attention
    from nsa_kernels.selected.attention import selected_attention_backward as selected_attention_backward
    from nsa_kernels.selection.select import select_blocks as select_blocks

# Which module holds each public name. No module has a public name for its own: importing it would hide the function.
_MODULES = {
    "combine": "gates.combine",
    "compress_mean": "phi.compress",
    "compress_mlp": "phi.compress",
    "compress_mlp_pair": "phi.compress",
    "compressed_attention": "interval.cmp_forward",
    "compressed_attention_backward": "interval.attention",
    "gate_deltas": "gates.sums",
    "merge": "gates.merge",
    "select_blocks": "selection.select",
    "selected_attention": "selected.attention",
    "selected_attention_backward": "selected.attention",
    "sum_branches": "gates.sums",
    "window_attention": "interval.win_forward",
    "window_attention_backward": "interval.win_forward",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "WHOLE_TILES":  # of these kernels alone: the reference has no tiles
        return import_module(f"{__name__}.common.wild").WHOLE_TILES
    if name not in _MODULES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
