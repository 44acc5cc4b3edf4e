"""Context-parallel Native Sparse Attention. Start reading at `nsa_dist.attention`."""

from nsa_dist.attention import BranchKV, nsa_attention
from nsa_dist.config import NSAConfig
from nsa_dist.cp.plan import ShardPlan

__all__ = ["BranchKV", "NSAConfig", "ShardPlan", "nsa_attention"]
