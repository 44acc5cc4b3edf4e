"""Bytes of the mailboxes of ranks that read each other's memory (`cp.one_sided`): two slots for each kind of exchange.

They live as long as the group, for all layers together, and are as large as what is put at once:

    pages               own keys and values of the selected branch
    pages.grad          gradients of a chunk of blocks for a head group, and a mark for each
    compressed          own compressed keys and values, of the rank that has most
    compressed.grad     of the whole sequence for a head group
    halo, halo.grad     rows of the rank that sends, or receives, most; gradients of the branch that has more

The rows of a slot are aligned, and a box has flags: a few hundred bytes that are left out.
"""

from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.cost import HeadSizes, halo_lengths, halo_rows, own_cmp_blocks
from nsa_dist.cp.options import CHUNK_BYTES
from nsa_dist.cp.plan import ShardPlan

SLOTS = 2


def mailbox_bytes(plan: ShardPlan, cfg: NSAConfig, heads: HeadSizes, num_head_groups: int) -> dict[str, int]:
    """By kind, of one process whose layers all have these sizes; a group of one has none."""
    if plan.cp_size == 1:
        return {}
    row_bytes, row_grad_bytes = heads.row_elements * heads.element_bytes, heads.row_elements * heads.grad_bytes
    halos = [halo_rows(plan, length) for length in halo_lengths(cfg)]
    most_sent = [max(sum(row[q] for row in halo) for q in range(plan.cp_size)) for halo in halos]
    most_received = max(sum(row) for halo in halos for row in halo)
    most_blocks = max(own_cmp_blocks(plan, cfg, rank) for rank in range(plan.cp_size))
    of_group = -(-heads.num_kv_heads // num_head_groups)
    block_bytes = of_group * plan.block_len * (heads.dim_k + heads.dim_v) * heads.grad_bytes
    chunk = max(1, min(plan.num_blocks, CHUNK_BYTES // block_bytes))
    group_row_bytes = of_group * (heads.dim_k + heads.dim_v) * heads.grad_bytes
    put = {
        "pages": plan.tokens_per_rank * row_bytes,
        "pages.grad": chunk * (block_bytes + of_group),
        "compressed": most_blocks * row_bytes,
        "compressed.grad": plan.cp_size * most_blocks * group_row_bytes,
        "halo": sum(most_sent) * row_bytes,
        "halo.grad": most_received * row_grad_bytes,
    }
    return {kind: SLOTS * num_bytes for kind, num_bytes in put.items()}
