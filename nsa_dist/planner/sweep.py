"""START HERE: a run planned for a cluster, for every context-parallel size that it could take."""

from collections.abc import Sequence
from dataclasses import dataclass

from nsa_dist.cp.formulas.work import load_imbalance
from nsa_dist.planner.cluster import Cluster
from nsa_dist.planner.core.one_sided import as_held
from nsa_dist.planner.core.strategies import Options, Strategy, held_bytes, sent_bytes, trips
from nsa_dist.planner.memory import rank_memory
from nsa_dist.planner.shape import Shape
from nsa_dist.planner.timing import StepTime, forward_runs, pages_fetched, step_time
from nsa_dist.train.config import TrainConfig

LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Outcome:
    """One strategy at one size: the fullest rank's memory by kind, the bytes it sends, the step's seconds."""

    strategy: Strategy
    memory_bytes: dict[str, int]
    held_bytes: int  # remote K/V at once, at any moment: the fullest one need not be that in which most of them are
    sent_bytes: dict[str, int]  # the busiest rank, one step, by kind
    time: StepTime
    pages: int  # of one layer and forward

    @property
    def total_bytes(self) -> int:
        return sum(self.memory_bytes.values())


@dataclass(frozen=True)
class Candidate:
    """One context-parallel size in its better layout."""

    shape: Shape
    replicas: int
    micro_batches: int  # of one step and replica
    idle_gpus: int
    imbalance: dict[str, float]  # by layout
    outcomes: tuple[Outcome, ...]  # by strategy, the judged one first

    @property
    def cp_size(self) -> int:
        return self.shape.plan.cp_size

    @property
    def layout(self) -> str:
        return self.shape.plan.layout

    @property
    def judged(self) -> Outcome:
        return self.outcomes[0]

    def outcome(self, how: str) -> Outcome:
        """Of the first strategy of this kind."""
        return next(o for o in self.outcomes if o.strategy.how == how)

    def fits(self, cluster: Cluster) -> bool:
        return self.judged.total_bytes <= cluster.gpu_memory_bytes.value


@dataclass(frozen=True)
class Plan:
    """What `nsa-dist plan` shows."""

    config: TrainConfig
    cluster: Cluster
    options: Options
    candidates: tuple[Candidate, ...]  # ascending cp_size

    @property
    def fitting(self) -> list[Candidate]:
        return [c for c in self.candidates if c.fits(self.cluster)]

    @property
    def best(self) -> Candidate | None:
        """The quickest step of those that fit; with equal steps the smaller size."""
        return min(self.fitting, key=lambda c: (c.judged.time.total_s, c.cp_size), default=None)


def make_plan(
    config: TrainConfig, cluster: Cluster, options: Options | None = None, cp_sizes: Sequence[int] | None = None
) -> Plan:
    """Plan `config` for `cluster`. `cp_sizes` None: the powers of two that the cluster and the sequence admit.

    The configuration's own context-parallel size and layout are one candidate among the others. ValueError if a
    given size does not fit the sequence or the cluster, or none does, and for a model with dense layers.
    """
    options = options or Options()
    _refuse_dense(config)
    if cp_sizes is None:
        cp_sizes = [size for size in _powers_of_two(cluster.num_gpus) if not _obstacle(config, cluster, size)]
        if not cp_sizes:
            raise ValueError(f"no context-parallel size can be planned: {_obstacle(config, cluster, 1)}")
    for size in cp_sizes:
        if obstacle := _obstacle(config, cluster, size):
            raise ValueError(f"context_parallel_size={size} cannot be planned: {obstacle}")
    return Plan(
        config, cluster, options, tuple(_candidate(config, cluster, options, size) for size in sorted(set(cp_sizes)))
    )


def _refuse_dense(config: TrainConfig) -> None:
    if config.model.has_dense:
        raise ValueError(
            f"model.attention={config.model.attention} has dense layers, and a plan knows what NSA layers hold, send "
            f"and take, and no others; plan with model.attention=nsa, and see what this run takes in its metrics "
            f"(memory_bytes, tokens_per_s)"
        )


def _candidate(config: TrainConfig, cluster: Cluster, options: Options, cp_size: int) -> Candidate:
    shapes = [Shape.of(config, cp_size, layout) for layout in LAYOUTS]
    imbalance = {s.plan.layout: load_imbalance(s.plan, config.nsa.sizes()) for s in shapes}
    # With one rank both are the same; the configuration's own is then kept.
    shape = min(shapes, key=lambda s: (imbalance[s.plan.layout], s.plan.layout != config.parallel.layout))
    replicas = _replicas(config, cluster, shape)
    micro_batches = config.run.global_batch_size // (replicas * config.run.micro_batch_size)
    return Candidate(
        shape=shape,
        replicas=replicas,
        micro_batches=micro_batches,
        idle_gpus=cluster.num_gpus - replicas * shape.gpus_per_replica,
        imbalance=imbalance,
        outcomes=tuple(
            _outcome(shape, strategy, options, cluster, replicas, micro_batches) for strategy in options.strategies()
        ),
    )


def _outcome(
    shape: Shape, strategy: Strategy, options: Options, cluster: Cluster, replicas: int, micro_batches: int
) -> Outcome:
    if strategy.how == "shared all-gather":
        shape = shape.with_shared_kv()
    memory = rank_memory(shape, strategy, options, cluster, micro_batches)
    return Outcome(
        strategy=strategy,
        memory_bytes=memory,
        held_bytes=max(
            memory["pages"], held_bytes(shape.core, as_held(shape.core, strategy, options, cluster), options)
        ),
        sent_bytes=_step_bytes(shape, strategy, options, micro_batches),
        time=step_time(shape, strategy, options, cluster, replicas, micro_batches),
        pages=pages_fetched(shape, strategy),
    )


def _step_bytes(shape: Shape, strategy: Strategy, options: Options, micro_batches: int) -> dict[str, int]:
    """Bytes by kind of one step on the rank that sends most of each kind, as `Traffic` counts them."""
    most = sent_bytes(shape.core, strategy, options)
    again = forward_runs(shape) - 1  # forward kinds travel once more when backward recomputes
    for kind in ("halo", "compressed", "bitmap"):
        most[kind] *= 1 + again
    once = trips(strategy, options)
    for kind in most.keys() & {"pages", "pages.inside"}:
        most[kind] = most[kind] * (once + again) // once
    calls = shape.most_layers * micro_batches * shape.calls
    return {kind: num_bytes * calls for kind, num_bytes in most.items()}


def _replicas(config: TrainConfig, cluster: Cluster, shape: Shape) -> int:
    """Data-parallel replicas: as many as the cluster holds and the batch feeds evenly."""
    room = cluster.num_gpus // shape.gpus_per_replica
    samples = max(1, config.run.global_batch_size // config.run.micro_batch_size)
    return max(n for n in range(1, room + 1) if samples % n == 0)


def _obstacle(config: TrainConfig, cluster: Cluster, cp_size: int) -> str:
    """Why a size cannot be planned and what to do, or empty."""
    parallel, run = config.parallel, config.run
    per_replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * cp_size
    if cluster.num_gpus % per_replica:
        return (
            f"a replica takes tensor * pipeline * context parallel size = {per_replica} GPUs, but must divide the "
            f"{cluster.num_gpus} of {cluster.name}, so that every GPU has a part; take a size that divides them, or "
            f"describe a larger cluster with --cluster"
        )
    chunk = 2 * cp_size * config.nsa.slc_block_len
    if run.sequence_length % chunk:
        return (
            f"sequence_length={run.sequence_length} must be a multiple of 2 * context_parallel_size * slc_block_len = "
            f"{chunk}, so that every rank holds whole selection blocks; take "
            f"sequence_length={-(-run.sequence_length // chunk) * chunk}"
        )
    if run.global_batch_size % run.micro_batch_size:
        return (
            f"global_batch_size={run.global_batch_size} must be a multiple of micro_batch_size="
            f"{run.micro_batch_size}, so that a step is whole micro batches; "
            f"take global_batch_size={-(-run.global_batch_size // run.micro_batch_size) * run.micro_batch_size}"
        )
    return ""


def _powers_of_two(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]
