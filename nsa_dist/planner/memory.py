"""Bytes of GPU memory that a rank needs at its peak, by kind.

What is saved for backward is listed tensor by tensor, as the modules of `nsa_dist.mcore` and Megatron-core's local
layers save it (RMSNorm fused, as on a GPU). What lives only while one layer is computed (`transient`) is the largest
of a few moments, each a sum of the buffers that are alive in it; that of the attention was compared with a GPU's.
"""

from nsa_dist.planner.cluster import Cluster
from nsa_dist.planner.core.memory import (
    compressed_bytes,
    extended_bytes,
    kept_page_bytes,
    largest_moment,
    results_bytes,
    statistics_bytes,
)
from nsa_dist.planner.core.mlp import LayerMLP
from nsa_dist.planner.core.one_sided import as_held, kept_for_exchanges
from nsa_dist.planner.core.strategies import Options, Strategy
from nsa_dist.planner.shape import Shape

KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "kv",
    "compressed",
    "pages",
    "mailboxes",
    "logits",
    "transient",
    "reserved",
)


def rank_memory(shape: Shape, strategy: Strategy, options: Options, cluster: Cluster, micro_batches: int) -> dict:
    """{kind: bytes} of the fullest pipeline stage. `micro_batches`: of one step and replica."""
    stages = [
        stage_memory(shape, strategy, options, cluster, stage, min(shape.num_stages - stage, micro_batches))
        for stage in range(shape.num_stages)
    ]
    return max(stages, key=lambda kinds: sum(kinds.values()))


def stage_memory(
    shape: Shape, strategy: Strategy, options: Options, cluster: Cluster, stage: int, in_flight: int
) -> dict[str, int]:
    """{kind: bytes} of one pipeline stage that keeps `in_flight` micro batches for their backward."""
    parameters = shape.stage_parameters(stage)
    is_last = stage == shape.num_stages - 1
    layers = len(shape.mlps(stage)) * in_flight  # layers whose saved tensors are alive together
    kept = 1 if shape.config.model.recompute_attention else layers
    held = as_held(shape.core, strategy, options, cluster)
    keeps_pages = options.fetch.keep_pages and strategy.how == "fetch"
    kept_pages = kept * shape.calls * kept_page_bytes(shape.core, held) if keeps_pages else 0
    moment = largest_moment(shape.core, held, options)
    return {
        "weights": parameters * shape.element_bytes,
        "gradients": parameters * 4,  # fp32 buffers of Megatron's data parallelism
        "optimizer": parameters * optimizer_bytes(shape),
        "activations": in_flight * stage_activation_bytes(shape, stage) + _ends_bytes(shape, stage),
        "kv": layers * shape.kv_pairs * _kv_pair_bytes(shape) + kept * core_kv_bytes(shape),
        "compressed": kept * shape.calls * compressed_bytes(shape.core),
        "pages": moment.remote + kept_pages,
        "mailboxes": kept_for_exchanges(shape.core, strategy, options, cluster),
        "logits": is_last * (1 + shape.mtp_layers(stage)) * logits_bytes(shape),
        "transient": kept * core_saved_bytes(shape) + working_bytes(shape, moment.work, stage),
        "reserved": int(cluster.reserved_bytes.value),
    }


def optimizer_bytes(shape: Shape) -> int:
    """Adam's two fp32 moments a parameter, and an fp32 copy of 16-bit weights. Not sharded over replicas."""
    return 12 if shape.element_bytes == 2 else 8


def stage_activation_bytes(shape: Shape, stage: int) -> int:
    """Of one micro batch, all layers of a stage."""
    return sum(layer_activation_bytes(shape, mlp) for mlp in shape.mlps(stage))


def layer_activation_bytes(shape: Shape, mlp: LayerMLP) -> int:
    """Saved of one layer outside its attention core and its K/V: hidden states, queries, gates, the MLP."""
    model, heads, e = shape.config.model, shape.heads, shape.element_bytes
    norm = (2 * model.hidden_size * e + 4) * shape.norm_share  # its input and output, and the fp32 root mean square
    queries = heads.num_q_heads * (heads.dim_k + 3) * e
    if shape.config.model.recompute_attention and heads.num_kv_heads > 1:
        queries *= 2  # what the recomputation starts from is a copy, the projection's output stays beside it
    around = int(shape.tokens * (2 * norm + queries + heads.num_q_heads * heads.dim_v * e))
    return around + mlp.saved_bytes(shape.tokens, int(shape.tokens * shape.norm_share), shape.batch, e)


def _kv_pair_bytes(shape: Shape) -> int:
    """One branch's K and V of this rank's tokens, as projected."""
    return shape.tokens * shape.heads.row_elements * shape.element_bytes


def core_kv_bytes(shape: Shape) -> int:
    """K/V that the attention core makes of the projected ones and saves: turned keys, and rows with their halos."""
    heads = shape.heads
    turned = shape.tokens * heads.num_kv_heads * heads.dim_k * shape.element_bytes
    if shape.plan.cp_size == 1:
        return turned * (1 if shape.config.nsa.shared_kv else 2)
    return turned + shape.calls * extended_bytes(shape.core)


def core_saved_bytes(shape: Shape) -> int:
    """Saved by the attention core beside K/V: turned queries, rotary tables, gates, the branches' results."""
    heads, nsa = shape.heads, shape.config.nsa
    turned_keys = 1 if nsa.shared_kv else 2 if nsa.compress_before_rope else 3
    queries = heads.num_q_heads * heads.dim_k * shape.element_bytes
    tables = (1 + turned_keys) * heads.dim_k * 4  # cosines and sines, fp32
    of_call = statistics_bytes(shape.core) + results_bytes(shape.core)
    return shape.tokens * (queries + tables + heads.num_q_heads * 3 * 4) + shape.calls * of_call


def logits_bytes(shape: Shape) -> int:
    """Logits, their fp32 copy and the fp32 probabilities that cross entropy saves."""
    return shape.tokens * shape.local_vocab * (shape.element_bytes + 8)


def working_bytes(shape: Shape, attention: int, stage: int) -> int:
    """The largest moment of computing one layer of a stage, beside everything saved.

    attention       its largest moment, in which the results of the sequence at hand, saved until then, are counted
                    where they are alive. The gradient of its output is there as well
    """
    core, e = shape.core, shape.element_bytes
    rows = core.tokens * core.heads.num_q_heads
    attending = attention - results_bytes(core) + rows * core.heads.dim_v * e
    turning = 14 * rows * core.heads.dim_k  # fp32 copies while queries are turned
    return max(attending, turning, *(mlp.moment_bytes(shape.tokens, e) for mlp in shape.mlps(stage)))


def _ends_bytes(shape: Shape, stage: int) -> int:
    """Token ids before the first layer; the final norm, targets and mask after the last, and after each behind it."""
    row = shape.config.model.hidden_size * shape.element_bytes
    norm = (2 * row + 4) * shape.norm_share
    first, last = stage == 0, stage == shape.num_stages - 1
    # Of multi-token prediction: ids, their embeddings, both in one row, the roots of two norms.
    ahead = shape.mtp_layers(stage) * (8 + (3 * row + 2 * 4) * shape.norm_share + norm + 9)
    return int(shape.tokens * (8 * first + (norm + 9) * last + ahead))
