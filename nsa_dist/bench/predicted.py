"""The planner's word on a case, to be printed beside what was measured."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nsa_dist.bench.case import Case
from nsa_dist.bench.show.report import Row
from nsa_dist.planner.cluster import load_cluster
from nsa_dist.planner.core.layer import layer_cost
from nsa_dist.planner.core.sizes import Core
from nsa_dist.planner.core.strategies import Options, Strategy
from nsa_dist.planner.measured_cp import with_links


class Predictor:
    """Predicts with the constants of a cluster description, and with those of the links once they are measured."""

    def __init__(self, description: Path, num_gpus: int) -> None:
        """ValueError if there is no such description."""
        self.cluster = load_cluster(description, num_nodes=1).model_copy(update={"gpus_per_node": num_gpus})

    def take_links(self, rows: list[Row], source: str) -> None:
        """Use what the links achieved here, if that was measured."""
        whole = [row for row in rows if "error" not in row]
        if whole:
            self.cluster = with_links(self.cluster, whole, source)

    def of(self, case: Case) -> dict[str, Any]:
        """Seconds, bytes that the busiest rank sends, and its peak memory."""
        core = core_of(case)
        cost = layer_cost(core, strategy_of(case), Options(fetch=case.fetch_options), self.cluster)
        return asdict(cost)


def core_of(case: Case) -> Core:
    """The planner's description of the case's layer; phi is an MLP as wide as the head."""
    heads = case.heads
    return Core(case.plan(), case.cfg, heads, (heads.dim_k, heads.dim_v))


def strategy_of(case: Case) -> Strategy:
    if case.mode == "fetch":
        return Strategy("fetch", case.union_fraction)
    return Strategy("raw all-gather" if case.mode == "all-gather" else case.mode)  # of three pairs
