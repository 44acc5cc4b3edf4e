"""Context-parallel Native Sparse Attention. Start reading at `nsa_dist.attention`."""

from torch.serialization import add_safe_globals

from nsa_dist.attention import BranchKV, nsa_attention
from nsa_dist.config import NSAConfig
from nsa_dist.cp.fetch import FetchOptions
from nsa_dist.cp.plan import ShardPlan

# They go into checkpoints with the arguments of a run, which torch.load(weights_only=True) loads if it knows them.
add_safe_globals([NSAConfig, FetchOptions])

__version__ = "0.1.0"

__all__ = ["BranchKV", "NSAConfig", "ShardPlan", "nsa_attention"]
