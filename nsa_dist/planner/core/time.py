"""Seconds of one layer's attention: FLOPs over achieved rates, bytes over links; the busiest rank sets the pace."""

from dataclasses import dataclass

from nsa_dist.cp.formulas.cost import total_cmp_blocks
from nsa_dist.cp.formulas.work import BRANCHES, backward_flops, forward_flops, rank_work
from nsa_dist.planner.cluster import Cluster, Collective, Constant, Link
from nsa_dist.planner.core.sizes import Core
from nsa_dist.planner.core.strategies import (
    COMPRESS_EVERYTHING,
    GATHERED,
    Options,
    Strategy,
    domain_size,
    num_gathers,
    num_rounds,
    sent_bytes,
    trips,
)

# What travels apart from the selected branch's K/V, and the collective that moves it.
_SENT_BY: dict[str, Collective] = {
    "halo": "all_to_all",
    "compressed": "all_gather",
    "bitmap": "all_gather",
    "halo.grad": "all_to_all",
    "compressed.grad": "reduce_scatter",
}


@dataclass(frozen=True)
class Phases:
    """Seconds by branch, or by kind of what is sent, nothing hidden under anything."""

    forward: dict[str, float]
    backward: dict[str, float]


def attention_s(core: Core, strategy: Strategy, cluster: Cluster) -> Phases:
    """By branch, of the rank whose branches take longest together. Raw K/V of everybody are compressed by everybody.

    Their backward compresses once more: nobody keeps what was gathered.
    """
    by_rank = []
    for rank in range(core.plan.cp_size):
        work = rank_work(core.plan, core.cfg, rank)
        forward = forward_flops(work, core.heads, core.cfg, core.phi_hidden_dims)
        backward = backward_flops(work, core.heads, core.cfg, core.phi_hidden_dims)
        rates = {branch: getattr(cluster.attention, branch) for branch in BRANCHES}
        phases = Phases(
            {branch: forward[branch] / rate.forward.value for branch, rate in rates.items()},
            {b: backward[b] / rate.backward.value if rate.backward else 0.0 for b, rate in rates.items()},
        )
        if strategy.how in COMPRESS_EVERYTHING and work.own_cmp_blocks:
            everything = total_cmp_blocks(core.plan, core.cfg) / work.own_cmp_blocks
            phases.forward["phi"] *= everything
            phases.backward["phi"] = everything * phases.backward["phi"] + phases.forward["phi"]
        by_rank.append(phases)
    return max(by_rank, key=lambda phases: sum(phases.forward.values()) + sum(phases.backward.values()))


def merge_s(core: Core, strategy: Strategy, options: Options, cluster: Cluster) -> float:
    """Merging partial results of rounds, one pass: read the sum and the part, write the sum, fp32."""
    merges = num_rounds(core, strategy, options) - 1
    elements = core.tokens * core.heads.num_q_heads * core.heads.dim_v
    return merges * elements * (4 + core.heads.element_bytes + 4) / memory_rate(cluster)


def wire_s(core: Core, strategy: Strategy, options: Options, cluster: Cluster) -> Phases:
    """By kind, the busiest rank; what backward sends again, pages that were not kept, is there as `pages`."""
    if core.plan.cp_size == 1:
        return Phases({}, {})
    most, rounds = sent_bytes(core, strategy, options), num_rounds(core, strategy, options)
    seconds = {kind: _collective_s(core, cluster, most[kind], name) for kind, name in _SENT_BY.items()}
    forward = {kind: s for kind, s in seconds.items() if not kind.endswith(".grad")}
    backward = {kind: s for kind, s in seconds.items() if kind.endswith(".grad")}
    again = trips(strategy, options)
    if "pages.inside" in most:
        for name in ("pages", "pages.inside"):
            forward[name] = _passed_s(core, cluster, options, most[name] / again, rounds, inside=name != "pages")
            backward[name] = forward[name] if again == 2 else 0.0
            grad = name.replace("pages", "pages.grad")
            backward[grad] = _passed_s(core, cluster, options, most[grad], rounds, inside=name != "pages")
        return Phases(forward, backward)
    once = _pages_s(core, cluster, strategy, most["pages"] / again, rounds, "all_gather")
    backward["pages"] = once if again == 2 else 0.0
    backward["pages.grad"] = _pages_s(core, cluster, strategy, most["pages.grad"], rounds, "reduce_scatter")
    return Phases(forward | {"pages": once}, backward)


def ranks_per_node(core: Core, cluster: Cluster) -> int:
    """Context-parallel ranks that share a node: tensor-parallel ranks are neighbours first."""
    return max(1, min(core.plan.cp_size, cluster.gpus_per_node // core.gpus_per_rank))


def rate(cluster: Cluster, link: Link, collective: Collective) -> float:
    """Bytes a second that a collective achieves over a link: as measured, or the usual share of the datasheet's."""
    measured: Constant | None = getattr(link.achieved, collective)
    return link.bytes_per_s.value * cluster.link_efficiency.value if measured is None else measured.value


def all_reduce_s(cluster: Cluster, link: Link, size: int, num_bytes: float) -> float:
    """Sum `num_bytes` over `size` ranks: a reduce-scatter, then an all-gather, each of (size - 1) / size of them."""
    sent = (size - 1) / size * num_bytes
    halves: tuple[Collective, ...] = ("reduce_scatter", "all_gather")
    return sum(sent / rate(cluster, link, name) for name in halves)


def memory_rate(cluster: Cluster) -> float:
    return cluster.memory_bytes_per_s.value


def _collective_s(core: Core, cluster: Cluster, num_bytes: float, name: Collective, messages: int = 1) -> float:
    """`messages` collectives in which a rank sends `num_bytes` in all.

    Between nodes every shard enters a node once, shared by the node's GPUs; inside it passes over the fast link.
    """
    if num_bytes == 0:
        return 0.0
    size, near = core.plan.cp_size, ranks_per_node(core, cluster)
    inside_s = num_bytes / rate(cluster, cluster.intra_node, name) + messages * cluster.intra_node.latency_s.value
    if size == near:
        return inside_s
    crossing = num_bytes / (size - 1) * (size - near) / near
    crossing_s = crossing / rate(cluster, cluster.inter_node, name)
    return max(inside_s, crossing_s + messages * cluster.inter_node.latency_s.value)


def _pages_s(
    core: Core, cluster: Cluster, strategy: Strategy, num_bytes: float, rounds: int, gathering: Collective
) -> float:
    """One trip of the remote K/V or of its gradients, packing included; `gathering` moves it where all of it goes."""
    size, near = core.plan.cp_size, ranks_per_node(core, cluster)
    if strategy.how in GATHERED:
        return _collective_s(core, cluster, num_bytes, gathering, num_gathers(core, strategy))
    slow = cluster.intra_node if size == near else cluster.inter_node
    if strategy.how == "ring":  # size - 1 steps; between nodes one link of each node carries every shard
        return num_bytes / rate(cluster, slow, "all_to_all") + (size - 1) * slow.latency_s.value
    # Each rank is sent its own pages, so a page crosses to a node as often as ranks there want it.
    return _exchange_s(core, cluster, num_bytes, (size - near) / (size - 1), rounds)


def _passed_s(core: Core, cluster: Cluster, options: Options, num_bytes: float, rounds: int, *, inside: bool) -> float:
    """One trip between domains, or inside them: of the latter nothing leaves a node that holds the domain."""
    size, near, domain = core.plan.cp_size, ranks_per_node(core, cluster), domain_size(core, options)
    far = max(0, domain - near) / (domain - 1) if inside else min(1.0, (size - near) / (size - domain))
    return _exchange_s(core, cluster, num_bytes, far, rounds)


def _exchange_s(core: Core, cluster: Cluster, num_bytes: float, far: float, rounds: int) -> float:
    """`rounds` all-to-alls in which a rank sends `num_bytes` in all, the share `far` to other nodes, and packing."""
    slow = cluster.inter_node if far else cluster.intra_node
    inside_s = num_bytes * (1 - far) / rate(cluster, cluster.intra_node, "all_to_all")
    wire_s = max(inside_s, num_bytes * far / rate(cluster, cluster.inter_node, "all_to_all"))
    return wire_s + rounds * slow.latency_s.value + 2 * num_bytes / memory_rate(cluster)
