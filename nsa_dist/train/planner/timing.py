"""Seconds of one training step, by part: FLOPs over achieved rates, bytes over links, and nothing cleverer.

A model: the parts are added up, the busiest rank sets the pace, and what a part's kernel achieves is one number
whatever its shape. Overlap is an input, not a prediction.
"""

from dataclasses import dataclass

from nsa_dist.cp.work import backward_flops, forward_flops, rank_work
from nsa_dist.train.planner.cluster import Cluster, Link
from nsa_dist.train.planner.shape import Shape
from nsa_dist.train.planner.strategies import Options, Strategy, num_rounds, page_counts, sent_bytes, trips

ATTENTION = ("phi", "cmp", "select", "slc", "win")


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
    sequences = (micro_batches + shape.num_stages - 1) * shape.batch
    layers = shape.layers_per_stage * sequences
    exposed = 1 - options.overlap
    compute = {name: layers * s for name, s in attention_s(shape, cluster).items()}
    compute["merge"] = layers * merge_s(shape, strategy, options, cluster)
    compute["dense"] = sequences * dense_s(shape, cluster)
    compute["elementwise"] = layers * elementwise_s(shape, cluster)
    compute["optimizer"] = optimizer_s(shape, cluster)
    wire = {name: layers * s * exposed for name, s in context_wire_s(shape, strategy, options, cluster).items()}
    wire["tensor"] = layers * tensor_wire_s(shape, cluster) * exposed
    wire["gradients"] = gradient_wire_s(shape, cluster, replicas) * exposed
    return StepTime(compute, wire)


# --- Compute --------------------------------------------------------------------------------------------------------


def attention_s(shape: Shape, cluster: Cluster) -> dict[str, float]:
    """By branch, forward and backward of one layer and sequence, on the rank whose branches take longest together."""
    cfg, forwards = shape.config.nsa.sizes(), forward_runs(shape)
    by_rank = []
    for rank in range(shape.plan.cp_size):
        work = rank_work(shape.plan, cfg, rank)
        forward = forward_flops(work, shape.heads, cfg, shape.phi_hidden_dims)
        backward = backward_flops(work, shape.heads, cfg, shape.phi_hidden_dims)
        seconds = {}
        for branch in ATTENTION:
            rates = getattr(cluster.attention, branch)
            seconds[branch] = forwards * forward[branch] / rates.forward.value
            if rates.backward is not None:
                seconds[branch] += backward[branch] / rates.backward.value
        by_rank.append(seconds)
    return max(by_rank, key=lambda seconds: sum(seconds.values()))


def forward_runs(shape: Shape) -> int:
    """Forwards of the attention core in one step: a second one when backward recomputes it."""
    return 2 if shape.config.model.recompute_attention else 1


def merge_s(shape: Shape, strategy: Strategy, options: Options, cluster: Cluster) -> float:
    """Merging partial results of rounds: read the sum and the part, write the sum, fp32, and their backward."""
    merges = num_rounds(shape, strategy, options) - 1
    elements = shape.plan.tokens_per_rank * shape.heads.num_q_heads * shape.heads.dim_v
    return (forward_runs(shape) + 1) * merges * elements * (4 + shape.element_bytes + 4) / _memory_rate(cluster)


def dense_s(shape: Shape, cluster: Cluster) -> float:
    """Linear layers of one stage and sequence, forward and backward: 6 FLOPs a weight and token; the output layer."""
    weights = shape.layers_per_stage * shape.linear_parameters + shape.local_vocab * shape.config.model.hidden_size
    return 6 * weights * shape.plan.tokens_per_rank / cluster.matmul_flops_per_s.value


def elementwise_s(shape: Shape, cluster: Cluster) -> float:
    """Norms, residuals, rotary positions, SwiGLU and gates of one layer, by the bytes they read and write.

    Rotary positions run as separate fp32 operations: 48 bytes an element. Backward moves twice what forward does.
    """
    heads, e, hidden = shape.heads, shape.element_bytes, shape.config.model.hidden_size
    turned = heads.num_q_heads * heads.dim_k + 2 * heads.num_kv_heads * heads.dim_k
    core = 48 * turned + 4 * e * heads.num_q_heads * heads.dim_v
    outside = 10 * e * hidden * shape.norm_share + 8 * e * shape.local_ffn
    per_token = (forward_runs(shape) + 2) * core + 3 * outside
    return shape.plan.tokens_per_rank * per_token / _memory_rate(cluster)


def optimizer_s(shape: Shape, cluster: Cluster) -> float:
    """AdamW over this rank's parameters: gradient, fp32 weight and two moments read, three written, the norm's read."""
    parameters = max(shape.stage_parameters(stage) for stage in range(shape.num_stages))
    return parameters * (4 * 8 + shape.element_bytes) / _memory_rate(cluster)


def _memory_rate(cluster: Cluster) -> float:
    return cluster.memory_bytes_per_s.value


# --- Wire -----------------------------------------------------------------------------------------------------------


def context_wire_s(shape: Shape, strategy: Strategy, options: Options, cluster: Cluster) -> dict[str, float]:
    """By kind, forward and backward of one layer and sequence over the context-parallel group, the busiest rank."""
    if shape.plan.cp_size == 1:
        return {}
    most = sent_bytes(shape, strategy, options)
    recomputed = forward_runs(shape)
    rounds = num_rounds(shape, strategy, options)
    seconds = {kind: _collective_s(shape, cluster, most[kind]) for kind in most if not kind.startswith("pages")}
    for kind in ("halo", "compressed", "bitmap"):
        seconds[kind] *= recomputed
    once = trips(strategy, options)  # and once more for a recomputed forward
    one_trip_s = _pages_s(shape, cluster, strategy, most["pages"] / once, rounds)
    seconds["pages"] = (once + recomputed - 1) * one_trip_s
    seconds["pages.grad"] = _pages_s(shape, cluster, strategy, most["pages.grad"], rounds)
    return seconds


def tensor_wire_s(shape: Shape, cluster: Cluster) -> float:
    """Two all-reduces of the hidden states forward and two backward; sequence parallelism moves as many bytes."""
    size = shape.tensor_size
    if size == 1:
        return 0.0
    hidden = shape.plan.tokens_per_rank * shape.config.model.hidden_size * shape.element_bytes
    sent = 2 * (size - 1) / size * hidden
    return 4 * (sent / _rate(cluster, cluster.intra_node) + cluster.intra_node.latency_s.value)


def gradient_wire_s(shape: Shape, cluster: Cluster, replicas: int) -> float:
    """One all-reduce of the fp32 gradients over replicas and context-parallel ranks, once a step."""
    size = replicas * shape.plan.cp_size
    if size == 1:
        return 0.0
    parameters = max(shape.stage_parameters(stage) for stage in range(shape.num_stages))
    inside = shape.gpus_per_replica * replicas <= cluster.gpus_per_node
    link = cluster.intra_node if inside else cluster.inter_node
    return 2 * (size - 1) / size * parameters * 4 / _rate(cluster, link) + 2 * link.latency_s.value


def ranks_per_node(shape: Shape, cluster: Cluster) -> int:
    """Context-parallel ranks that share a node: tensor-parallel ranks are neighbours first."""
    return max(1, min(shape.plan.cp_size, cluster.gpus_per_node // shape.tensor_size))


def _collective_s(shape: Shape, cluster: Cluster, num_bytes: float) -> float:
    """An all-gather, reduce-scatter or exchange in which a rank sends `num_bytes` in all.

    Between nodes every shard enters a node once, shared by the node's GPUs; inside it passes over the fast link.
    """
    if num_bytes == 0:
        return 0.0
    size, near = shape.plan.cp_size, ranks_per_node(shape, cluster)
    inside_s = num_bytes / _rate(cluster, cluster.intra_node) + cluster.intra_node.latency_s.value
    if size == near:
        return inside_s
    crossing = num_bytes / (size - 1) * (size - near) / near
    return max(inside_s, crossing / _rate(cluster, cluster.inter_node) + cluster.inter_node.latency_s.value)


def _pages_s(shape: Shape, cluster: Cluster, strategy: Strategy, num_bytes: float, rounds: int) -> float:
    """One trip of the remote K/V or of its gradients, packing included."""
    size, near = shape.plan.cp_size, ranks_per_node(shape, cluster)
    if strategy.how == "all-gather":
        return _collective_s(shape, cluster, num_bytes)
    slow = cluster.intra_node if size == near else cluster.inter_node
    if strategy.how == "ring":  # size - 1 steps; between nodes one link of each node carries every shard
        return num_bytes / _rate(cluster, slow) + (size - 1) * slow.latency_s.value
    # Each rank is sent its own pages, so a page crosses to a node as often as ranks there want it.
    far = num_bytes * (size - near) / (size - 1)
    inside_s = (num_bytes - far) / _rate(cluster, cluster.intra_node)
    wire_s = max(inside_s, far / _rate(cluster, cluster.inter_node)) + rounds * slow.latency_s.value
    return wire_s + 2 * num_bytes / _memory_rate(cluster)


def pages_fetched(shape: Shape, strategy: Strategy) -> int:
    """Pages of the rank that receives most, in one forward of one layer and sequence."""
    return max(map(sum, page_counts(shape, strategy)))


def _rate(cluster: Cluster, link: Link) -> float:
    return link.bytes_per_s.value * cluster.link_efficiency.value
