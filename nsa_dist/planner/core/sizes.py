"""One layer's attention on the ranks of one context-parallel group, one call: all that its costs depend on."""

from dataclasses import dataclass

from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.plan import ShardPlan


@dataclass(frozen=True)
class Core:
    """The tokens and heads of one rank.

    phi_hidden_dims     hidden sizes of the MLPs that compress K and V, () for the mean
    gpus_per_rank       neighbouring GPUs of one context-parallel rank: the tensor-parallel size
    """

    plan: ShardPlan
    cfg: NSAConfig
    heads: HeadSizes
    phi_hidden_dims: tuple[int, ...]
    gpus_per_rank: int = 1

    @property
    def tokens(self) -> int:
        """Of a rank, padding counted."""
        return self.plan.tokens_per_rank

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads.num_q_heads // self.heads.num_kv_heads
