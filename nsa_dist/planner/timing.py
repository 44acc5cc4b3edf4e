"""Seconds of one training step, by part: FLOPs over achieved rates, bytes over links, and nothing cleverer.

A model: the parts are added up, the busiest rank sets the pace, and what a part's kernel achieves is one number
whatever its shape. Overlap is an input, not a prediction.
"""

from dataclasses import dataclass

from nsa_dist.cp.formulas.work import BRANCHES
from nsa_dist.planner.cluster import Cluster
from nsa_dist.planner.core.strategies import Options, Strategy, page_counts
from nsa_dist.planner.core.time import all_reduce_s, attention_s, memory_rate, merge_s, rate, wire_s
from nsa_dist.planner.shape import Shape


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the busiest rank. The wire's are those not hidden under compute."""

    compute_s: dict[str, float]
    wire_s: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.compute_s.values()) + sum(self.wire_s.values())


def step_time(
    shape: Shape, strategy: Strategy, options: Options, cluster: Cluster, replicas: int, micro_batches: int
) -> StepTime:
    """One optimizer step of every replica: `micro_batches` forwards and backwards, then gradients and optimizer."""
    # A pipeline of s stages takes s - 1 micro batches to fill and drain.
    rounds = micro_batches + shape.num_stages - 1
    sequences = rounds * shape.batch
    calls = shape.most_layers * rounds * shape.calls
    exposed = 1 - options.overlap
    attention, forwards = attention_s(shape.core, strategy, cluster), forward_runs(shape)
    compute = {b: calls * (forwards * attention.forward[b] + attention.backward[b]) for b in BRANCHES}
    compute["merge"] = calls * (forwards + 1) * merge_s(shape.core, strategy, options, cluster)
    compute["dense"] = sequences * dense_s(shape, cluster)
    compute["elementwise"] = sequences * elementwise_s(shape, cluster)
    compute["optimizer"] = optimizer_s(shape, cluster)
    wire = {name: calls * s * exposed for name, s in _context_wire_s(shape, strategy, options, cluster).items()}
    wire["tensor"] = sequences * tensor_wire_s(shape, cluster) * exposed
    wire["gradients"] = gradient_wire_s(shape, cluster, replicas) * exposed
    return StepTime(compute, wire)


# --- Compute --------------------------------------------------------------------------------------------------------


def forward_runs(shape: Shape) -> int:
    """Forwards of the attention core in one step: a second one when backward recomputes it."""
    return 2 if shape.config.model.recompute_attention else 1


def dense_s(shape: Shape, cluster: Cluster) -> float:
    """Linear layers of the busiest stage, one sequence, both ways: 6 FLOPs a weight and token; the output layer."""
    weights = max(map(shape.stage_multiplications, range(shape.num_stages)))
    weights += shape.local_vocab * shape.config.model.hidden_size
    return 6 * weights * shape.plan.tokens_per_rank / cluster.matmul_flops_per_s.value


def elementwise_s(shape: Shape, cluster: Cluster) -> float:
    """Norms, residuals, rotary positions, SwiGLU and gates of the busiest stage, by the bytes they read and write.

    Rotary positions run as separate fp32 operations: 48 bytes an element. Backward moves twice what forward does.
    """
    heads, e, hidden = shape.heads, shape.element_bytes, shape.config.model.hidden_size
    turned = heads.num_q_heads * heads.dim_k + 2 * heads.num_kv_heads * heads.dim_k
    core = 48 * turned + 4 * e * heads.num_q_heads * heads.dim_v
    around = 10 * e * hidden * shape.norm_share

    def per_token(stage: int) -> float:
        return sum((forward_runs(shape) + 2) * core + 3 * (around + mlp.moved_bytes(e)) for mlp in shape.mlps(stage))

    return shape.plan.tokens_per_rank * max(map(per_token, range(shape.num_stages))) / memory_rate(cluster)


def optimizer_s(shape: Shape, cluster: Cluster) -> float:
    """AdamW over this rank's parameters: gradient, fp32 weight and two moments read, three written, the norm's read."""
    parameters = max(shape.stage_parameters(stage) for stage in range(shape.num_stages))
    return parameters * (4 * 8 + shape.element_bytes) / memory_rate(cluster)


# --- Wire -----------------------------------------------------------------------------------------------------------


def _context_wire_s(shape: Shape, strategy: Strategy, options: Options, cluster: Cluster) -> dict[str, float]:
    """By kind, forward, recomputed forward and backward of one layer and call over the context-parallel group."""
    phases = wire_s(shape.core, strategy, options, cluster)
    seconds = {kind: forward_runs(shape) * s for kind, s in phases.forward.items()}
    for kind, s in phases.backward.items():
        seconds[kind] = seconds.get(kind, 0.0) + s
    return seconds


def tensor_wire_s(shape: Shape, cluster: Cluster) -> float:
    """Of one sequence, the busiest stage: two all-reduces of a layer's hidden states forward and two backward.

    Sequence parallelism moves as many bytes. Experts are told of every token what the routers say, and tell it back.
    """
    size = shape.tensor_size
    if size == 1:
        return 0.0
    hidden = shape.plan.tokens_per_rank * shape.config.model.hidden_size * shape.element_bytes
    link = cluster.intra_node
    layer_s = 4 * (all_reduce_s(cluster, link, size, hidden) + link.latency_s.value)
    experts = max(sum(mlp.num_experts for mlp in shape.mlps(stage)) for stage in range(shape.num_stages))
    told = (size - 1) / size * shape.plan.tokens_per_rank * experts * (4 + 1 + 4)  # weights, choices; gradients
    return shape.most_layers * layer_s + told / rate(cluster, link, "all_gather")


def gradient_wire_s(shape: Shape, cluster: Cluster, replicas: int) -> float:
    """One all-reduce of the fp32 gradients over replicas and context-parallel ranks, once a step."""
    size = replicas * shape.plan.cp_size
    if size == 1:
        return 0.0
    parameters = max(shape.stage_parameters(stage) for stage in range(shape.num_stages))
    inside = shape.gpus_per_replica * replicas <= cluster.gpus_per_node
    link = cluster.intra_node if inside else cluster.inter_node
    return all_reduce_s(cluster, link, size, parameters * 4) + 2 * link.latency_s.value


def pages_fetched(shape: Shape, strategy: Strategy) -> int:
    """Pages of the rank that receives most, in one forward of one layer and sequence."""
    return max(map(sum, page_counts(shape.core, strategy)))
