"""Constants that `nsa-dist bench cp` measured: what a machine's links achieve, and its kernels on one rank's share.

`--out FOLDER` writes FOLDER/cp.json. `links` are there when ranks had a GPU each, `shares` when one rank of many ran.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.formulas.work import BRANCHES, backward_flops, forward_flops, rank_work
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.planner.cluster import Achieved, BranchRates, Cluster, Constant, Rates

Row = Mapping[str, Any]


def with_cp_bench(cluster: Cluster, data: Mapping[str, Any], group: int) -> Cluster:
    """`cluster` with everything that the file's `data` has measured. ValueError if that is nothing.

    group       query heads of a kv head: of the shares the nearest counts, among equals the longest
    """
    about = data["machine"]
    source = f"{about['command']} on {about['num_devices']} x {about['device']}, {about['date']}"
    links = [row for row in data.get("links", []) if "error" not in row] if _own_gpus(about) else []
    shares = [row for row in data.get("shares", []) if _has_rates(row)]
    if not links and not shares:
        raise ValueError(
            "this cp.json measured neither links (ranks with a GPU each) nor the share of one rank on a GPU, so no "
            "constant can be taken from it; run nsa-dist bench cp --gpus all, or nsa-dist bench cp, on the GPUs"
        )
    if links:
        cluster = with_links(cluster, links, source)
    if shares:
        share = min(shares, key=lambda row: (abs(_group(row) - group), -row["tokens"]))
        cluster = cluster.model_copy(update={"attention": _rates(cluster, share, source)})
    return cluster


def with_links(cluster: Cluster, rows: Sequence[Row], source: str) -> Cluster:
    """`cluster` with what the collectives of a node's GPUs achieved.

    Of the largest group: each collective's rate is that of the one that sent most, the quickest of all gives the
    latency. Links between nodes were not measured: they keep their rate and latency, and take over the share of the
    datasheet's rate that the all-to-all reached.
    """
    size = max(row["cp_size"] for row in rows)
    of_size = [row for row in rows if row["cp_size"] == size]
    largest: dict[str, Row] = {}
    for row in sorted(of_size, key=lambda row: row["sent_bytes"]):
        largest[row["collective"]] = row
    rates = {name: _measured(row["bytes_per_s"], _told(row, source)) for name, row in largest.items()}
    least_s = min(row["seconds"] for row in of_size)
    intra_node = cluster.intra_node.model_copy(
        update={"latency_s": _measured(least_s, source), "achieved": Achieved(**rates)}
    )
    exchange = rates["all_to_all"]
    share = _measured(exchange.value / intra_node.bytes_per_s.value, exchange.source)
    return cluster.model_copy(update={"intra_node": intra_node, "link_efficiency": share})


def _told(row: Row, source: str) -> str:
    return f"{source}, {row['collective']} of {row['sent_bytes'] / 1e6:.0f} MB over {row['cp_size']} ranks"


def _rates(cluster: Cluster, row: Row, source: str) -> BranchRates:
    """FLOPs of the rank over the time of each branch; branches that were not timed apart keep their rate."""
    heads, cfg = HeadSizes(**row["heads"]), NSAConfig(**row["cfg"])
    plan = getattr(ShardPlan, row["layout"])([0, row["tokens"]], row["cp_size"], cfg.slc_block_len)
    work, phi_dims = rank_work(plan, cfg, row["rank"]), (heads.dim_k, heads.dim_v)
    flops = {
        "forward": forward_flops(work, heads, cfg, phi_dims),
        "backward": backward_flops(work, heads, cfg, phi_dims),
    }
    told = f"{source}, rank {row['rank']} of {row['case']}"

    def rate(phase: str, branch: str, known: Constant | None) -> Constant | None:
        seconds = row["parts_s"].get(f"{phase}.{branch}", 0.0)
        return _measured(flops[phase][branch] / seconds, told) if seconds and flops[phase][branch] else known

    found = {}
    for branch in BRANCHES:
        known: Rates = getattr(cluster.attention, branch)
        forward = rate("forward", branch, known.forward)
        found[branch] = Rates(forward=forward or known.forward, backward=rate("backward", branch, known.backward))
    return BranchRates(**found)


def _own_gpus(about: Row) -> bool:
    """Whether every rank had a GPU: what shares one says nothing of links."""
    return about["num_devices"] > 1


def _has_rates(row: Row) -> bool:
    return "error" not in row and row["mode"] == "fetch" and row["peak_bytes"] is not None


def _group(row: Row) -> float:
    return row["heads"]["num_q_heads"] / row["heads"]["num_kv_heads"]


def _measured(value: float, source: str) -> Constant:
    return Constant(value=value, evidence="measured", source=source)
