"""What a plan computes, in closed form: keys attended and FLOPs by branch for every rank, and how even they are.

For the query at position o of its document, of one head (arXiv 2502.11089, section 3):

    cmp     max(0, (o + 1 - l) // d + 1)        compressed blocks that end at or before it; scored again to select
    slc     o + 1 while it sees at most n blocks; then (n - 1) * l' + o % l' + 1, its own block being chosen always
    win     min(o + 1, w)

Sums over intervals of o are differences of the closed sums below, so no token is ever enumerated.
"""

from dataclasses import dataclass

from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.cost import HeadSizes, own_cmp_blocks, pieces
from nsa_dist.cp.plan import ShardPlan

BRANCHES = ("phi", "cmp", "select", "slc", "win")


@dataclass(frozen=True)
class RankWork:
    """One layer and one sequence on one rank. Keys are summed over its queries, for one head."""

    cmp_keys: int
    slc_keys: int
    win_keys: int
    own_cmp_blocks: int

    @property
    def attended_keys(self) -> int:
        return self.cmp_keys + self.slc_keys + self.win_keys


def rank_work(plan: ShardPlan, cfg: NSAConfig, rank: int) -> RankWork:
    """The work of `rank`, padding left out."""

    def compute() -> RankWork:
        own = pieces(plan, rank)
        return RankWork(
            cmp_keys=sum(cmp_keys_below(p.stop, cfg) - cmp_keys_below(p.start, cfg) for p in own),
            slc_keys=sum(slc_keys_below(p.stop, cfg) - slc_keys_below(p.start, cfg) for p in own),
            win_keys=sum(win_keys_below(p.stop, cfg) - win_keys_below(p.start, cfg) for p in own),
            own_cmp_blocks=own_cmp_blocks(plan, cfg, rank),
        )

    return plan.memo(("rank_work", cfg, rank), compute)


def load_imbalance(plan: ShardPlan, cfg: NSAConfig) -> float:
    """Keys attended by the busiest rank over the mean of all ranks: 1 is even, P is one rank doing everything."""
    keys = [rank_work(plan, cfg, rank).attended_keys for rank in range(plan.cp_size)]
    return max(keys) * len(keys) / sum(keys)


def forward_flops(work: RankWork, heads: HeadSizes, cfg: NSAConfig, phi_hidden_dims: tuple[int, ...]) -> dict[str, int]:
    """FLOPs of one forward by branch, two for each multiply-add; phi is counted as it is written, block by block.

    phi_hidden_dims     hidden size of the MLP over K and of that over V, or () for the mean, which has no product
    """
    pair = 2 * heads.num_q_heads * (heads.dim_k + heads.dim_v)
    phi = sum(
        2 * heads.num_kv_heads * (cfg.cmp_block_len * dim * hidden + hidden * dim)
        for dim, hidden in zip((heads.dim_k, heads.dim_v), phi_hidden_dims, strict=False)
    )
    return {
        "phi": work.own_cmp_blocks * phi,
        "cmp": work.cmp_keys * pair,
        "select": work.cmp_keys * 2 * heads.num_q_heads * heads.dim_k,
        "slc": work.slc_keys * pair,
        "win": work.win_keys * pair,
    }


def backward_flops(
    work: RankWork, heads: HeadSizes, cfg: NSAConfig, phi_hidden_dims: tuple[int, ...]
) -> dict[str, int]:
    """FLOPs of one backward: scores again, dP and dV over Dv, dQ and dK over Dk; phi twice; selection has none."""
    forward = forward_flops(work, heads, cfg, phi_hidden_dims)
    pair = 2 * heads.num_q_heads * (3 * heads.dim_k + 2 * heads.dim_v)
    return {
        "phi": 2 * forward["phi"],
        "cmp": work.cmp_keys * pair,
        "select": 0,
        "slc": work.slc_keys * pair,
        "win": work.win_keys * pair,
    }


# --- Closed sums over the first `length` queries of a document ------------------------------------------------------


def cmp_keys_below(length: int, cfg: NSAConfig) -> int:
    """Sum of z // d + 1 over z = 0 .. length - l: query l - 1 is the first that sees a compressed block."""
    seeing = max(0, length - cfg.cmp_block_len + 1)
    full, rest = divmod(seeing, cfg.cmp_stride)
    return cfg.cmp_stride * full * (full + 1) // 2 + rest * (full + 1)


def slc_keys_below(length: int, cfg: NSAConfig) -> int:
    """Everything up to query n * l', then n - 1 whole blocks and the causal part of the own one."""
    block, dense = cfg.slc_block_len, min(length, cfg.num_slc_blocks * cfg.slc_block_len)
    sparse = length - dense
    full, rest = divmod(sparse, block)
    own = full * (block * (block + 1) // 2) + rest * (rest + 1) // 2
    return dense * (dense + 1) // 2 + sparse * (cfg.num_slc_blocks - 1) * block + own


def win_keys_below(length: int, cfg: NSAConfig) -> int:
    growing = min(length, cfg.window_len)
    return growing * (growing + 1) // 2 + (length - growing) * cfg.window_len
