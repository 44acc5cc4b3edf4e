"""What the planner says of a run whose ranks ran out of memory: what should lie where, and what to change."""

from dataclasses import dataclass

from nsa_dist.planner.cluster import DEFAULT_CLUSTER, Cluster, Constant, load_cluster
from nsa_dist.planner.core.strategies import Options
from nsa_dist.planner.knobs import turn_knobs
from nsa_dist.planner.memory import rank_memory
from nsa_dist.planner.shape import Shape
from nsa_dist.planner.sweep import make_plan
from nsa_dist.train.config import TrainConfig


@dataclass(frozen=True)
class Remedy:
    """Words of the command line, and the bytes that the fullest rank would need with them."""

    words: str
    total_bytes: int
    fits: bool


@dataclass(frozen=True)
class Shortage:
    """Bytes of the fullest rank by kind, as planned, and what would need fewer: first what fits."""

    memory_bytes: dict[str, int]
    remedies: list[Remedy]

    @property
    def total_bytes(self) -> int:
        return sum(self.memory_bytes.values())


def shortage(config: TrainConfig, device_bytes: int, num_nodes: int, per_node: int) -> Shortage:
    """Of a run on `num_nodes` nodes with `per_node` ranks each, whose devices hold `device_bytes`."""
    cluster = _cluster(device_bytes, num_nodes, per_node)
    options, parallel, run = Options(fetch=config.parallel.fetch_options()), config.parallel, config.run
    shape = Shape.of(config, parallel.context_parallel_size, parallel.layout)
    replicas = config.data_parallel_size(cluster.num_gpus)
    micro_batches = run.global_batch_size // (replicas * run.micro_batch_size)
    kinds = rank_memory(shape, options.strategies()[0], options, cluster, micro_batches)
    return Shortage(kinds, _remedies(config, cluster, options, sum(kinds.values())))


def _remedies(config: TrainConfig, cluster: Cluster, options: Options, needed: int) -> list[Remedy]:
    try:
        plan = make_plan(config, cluster, options)
    except ValueError:  # no size of the planner's fits these ranks
        return []
    sizes = [
        Remedy(f"parallel.context_parallel_size={c.cp_size}", c.judged.total_bytes, c.fits(cluster))
        for c in plan.candidates
        if c.cp_size > config.parallel.context_parallel_size
    ]
    own = config.parallel.context_parallel_size
    knobs = [
        Remedy(_with_size(k.words, k.candidate.cp_size, own), k.candidate.judged.total_bytes, k.fits)
        for k in turn_knobs(plan)
    ]
    fewer = [remedy for remedy in [*sizes, *knobs] if remedy.total_bytes < needed]
    return sorted(fewer, key=lambda remedy: (not remedy.fits, len(remedy.words.split()), remedy.total_bytes))


def _with_size(words: str, cp_size: int, configured: int) -> str:
    return words if cp_size == configured else f"{words} parallel.context_parallel_size={cp_size}"


def _cluster(device_bytes: int, num_nodes: int, per_node: int) -> Cluster:
    """The default cluster's rates, which memory does not depend on, with the run's ranks and devices."""
    memory = Constant(value=device_bytes, evidence="measured", source="the device that was full")
    update = {"num_nodes": num_nodes, "gpus_per_node": per_node, "gpu_memory_bytes": memory}
    return load_cluster(DEFAULT_CLUSTER).model_copy(update=update)
