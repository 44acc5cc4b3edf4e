"""Context-parallel Native Sparse Attention. Start reading at `nsa_dist.attention`.

What is named here is imported when it is first asked for: a command that only checks a configuration needs no torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_dist.attention import BranchKV, nsa_attention
    from nsa_dist.config import NSAConfig
    from nsa_dist.cp.plan import ShardPlan

__version__ = "0.1.0"

__all__ = ["BranchKV", "NSAConfig", "ShardPlan", "nsa_attention"]


def __getattr__(name: str) -> Any:
    """The attention with all that it stands on, then `name` from it. Python calls this for what is not here yet."""
    if not name.startswith("_"):
        attention = import_module("nsa_dist.attention")
        if name in __all__:
            return getattr(attention, name)
        if name in globals():  # a package below, such as `nsa_dist.cp`
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:  # else with the attention, as late as that
    import_module("nsa_dist.saved")
