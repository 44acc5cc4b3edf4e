"""What ranks hold that read each other's memory: mailboxes, and buffers with a place for every remote block."""

from dataclasses import replace

from nsa_dist.cp.formulas.mailboxes import mailbox_bytes
from nsa_dist.planner.cluster import Cluster
from nsa_dist.planner.core.sizes import Core
from nsa_dist.planner.core.strategies import Options, Strategy, domain_size, head_groups
from nsa_dist.planner.core.time import ranks_per_node


def reads_memory(core: Core, strategy: Strategy, options: Options, cluster: Cluster) -> bool:
    """Whether ranks will: those that fetch inside one node, whose GPUs are taken to reach each other."""
    inside = core.plan.cp_size > 1 and ranks_per_node(core, cluster) == core.plan.cp_size
    asked = options.fetch.transport != "all_to_all" and domain_size(core, options) == 1
    return strategy.how == "fetch" and inside and asked


def as_held(core: Core, strategy: Strategy, options: Options, cluster: Cluster) -> Strategy:
    """The strategy by which remote pages take memory: read ones as much as if all were chosen."""
    return replace(strategy, union_fraction=1.0) if reads_memory(core, strategy, options, cluster) else strategy


def kept_for_exchanges(core: Core, strategy: Strategy, options: Options, cluster: Cluster) -> int:
    """Bytes of a process's mailboxes, for all layers together."""
    if not reads_memory(core, strategy, options, cluster):
        return 0
    return sum(mailbox_bytes(core.plan, core.cfg, core.heads, head_groups(core, options)).values())
