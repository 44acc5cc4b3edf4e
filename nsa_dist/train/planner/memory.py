"""Bytes of GPU memory that a rank needs at its peak, by kind.

What is saved for backward is listed tensor by tensor, as the modules of `nsa_dist.mcore` and Megatron-core's local
layers save it (RMSNorm fused, as on a GPU). What lives only while one layer is computed (`transient`) is the largest
of a few moments, each a sum of the buffers that are alive in it; that of the attention was compared with a GPU's.
"""

from nsa_dist.cp import cost
from nsa_dist.train.planner.cluster import Cluster
from nsa_dist.train.planner.shape import Shape
from nsa_dist.train.planner.strategies import Options, Strategy, held_bytes, page_bytes, page_counts

KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "kv",
    "compressed",
    "pages",
    "logits",
    "transient",
    "reserved",
)

# The selected branch's kernels work in chunks of queries so that their workspace stays below this.
WORKSPACE_BYTES = 2 * 2**30


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
    layers = shape.layers_per_stage * in_flight  # layers whose saved tensors are alive together
    kept = 1 if shape.config.model.recompute_attention else layers
    keeps_pages = options.fetch.keep_pages and strategy.how == "fetch"
    return {
        "weights": parameters * shape.element_bytes,
        "gradients": parameters * 4,  # fp32 buffers of Megatron's data parallelism
        "optimizer": parameters * optimizer_bytes(shape),
        "activations": layers * layer_activation_bytes(shape) + _ends_bytes(shape, stage),
        "kv": layers * shape.kv_pairs * _kv_pair_bytes(shape) + kept * core_kv_bytes(shape),
        "compressed": kept * compressed_bytes(shape),
        "pages": held_bytes(shape, strategy, options) + (kept_page_bytes(shape, strategy) * kept if keeps_pages else 0),
        "logits": is_last * logits_bytes(shape),
        "transient": kept * core_saved_bytes(shape) + working_bytes(shape),
        "reserved": int(cluster.reserved_bytes.value),
    }


def optimizer_bytes(shape: Shape) -> int:
    """Adam's two fp32 moments a parameter, and an fp32 copy of 16-bit weights. Not sharded over replicas."""
    return 12 if shape.element_bytes == 2 else 8


def layer_activation_bytes(shape: Shape) -> int:
    """Saved of one layer outside its attention core and its K/V: hidden states, queries, gates, the MLP."""
    model, heads, e = shape.config.model, shape.heads, shape.element_bytes
    norm = (2 * model.hidden_size * e + 4) * shape.norm_share  # its input and output, and the fp32 root mean square
    queries = heads.num_q_heads * (heads.dim_k + 3) * e
    if shape.config.model.recompute_attention and heads.num_kv_heads > 1:
        queries *= 2  # what the recomputation starts from is a copy, the projection's output stays beside it
    mlp = 5 * shape.local_ffn * e  # gate and up, silu(gate), up + 0, their product
    return int(shape.tokens * (2 * norm + queries + heads.num_q_heads * heads.dim_v * e + mlp))


def _kv_pair_bytes(shape: Shape) -> int:
    """One branch's K and V of this rank's tokens, as projected."""
    return shape.tokens * shape.heads.row_elements * shape.element_bytes


def core_kv_bytes(shape: Shape) -> int:
    """K/V that the attention core makes of the projected ones and saves: turned keys, and rows with their halos."""
    heads, e = shape.heads, shape.element_bytes
    turned = shape.tokens * heads.num_kv_heads * heads.dim_k * e
    if shape.plan.cp_size == 1:
        return turned * (1 if shape.config.nsa.shared_kv else 2)
    halos = sum(
        max(map(sum, cost.halo_rows(shape.plan, length))) for length in cost.halo_lengths(shape.config.nsa.sizes())
    )
    return turned + (2 * shape.tokens + shape.batch * halos) * heads.row_elements * e


def compressed_bytes(shape: Shape) -> int:
    """Compressed K and V of the whole sequence, and of the own blocks what phi's MLPs save."""
    cfg = shape.config.nsa.sizes()
    own = max(cost.own_cmp_blocks(shape.plan, cfg, rank) for rank in range(shape.plan.cp_size))
    hidden = own * shape.heads.num_kv_heads * sum(shape.phi_hidden_dims)
    rows = cost.total_cmp_blocks(shape.plan, cfg) * shape.heads.row_elements
    return shape.batch * (rows + hidden) * shape.element_bytes


def core_saved_bytes(shape: Shape) -> int:
    """Saved by the attention core beside K/V: turned queries, rotary tables, the branches' results."""
    heads, nsa = shape.heads, shape.config.nsa
    turned_keys = 1 if nsa.shared_kv else 2 if nsa.compress_before_rope else 3
    queries = heads.num_q_heads * heads.dim_k * shape.element_bytes
    tables = (1 + turned_keys) * heads.dim_k * 4  # cosines and sines, fp32
    return shape.tokens * (queries + tables + heads.num_q_heads * 3 * 4) + shape.batch * _results_bytes(shape)


def _results_bytes(shape: Shape) -> int:
    """Out and log-sum-exp of every branch and the chosen blocks, of one sequence."""
    heads = shape.heads
    per_token = 3 * heads.num_q_heads * (heads.dim_v * shape.element_bytes + 4)
    return shape.plan.tokens_per_rank * (per_token + heads.num_kv_heads * shape.config.nsa.num_slc_blocks * 4)


def kept_page_bytes(shape: Shape, strategy: Strategy) -> int:
    """Pages of one layer that wait for their backward when they are not fetched again."""
    most = max(map(sum, page_counts(shape, strategy)))
    return shape.batch * most * page_bytes(shape, shape.element_bytes)


def logits_bytes(shape: Shape) -> int:
    """Logits, their fp32 copy and the fp32 probabilities that cross entropy saves."""
    return shape.tokens * shape.local_vocab * (shape.element_bytes + 8)


def working_bytes(shape: Shape) -> int:
    """The largest moment of computing one layer, beside everything saved."""
    q, out = _query_elements(shape)
    turning = 14 * q  # fp32 copies while queries are turned
    gates = 4 * out * shape.element_bytes  # gradients of the output and of the three branches' results
    mlp = 5 * shape.tokens * shape.local_ffn * shape.element_bytes
    return max(selected_backward_bytes(shape), turning, gates, mlp)


def selected_backward_bytes(shape: Shape) -> int:
    """Backward of the selected branch, the window's being done and its result let go.

    Alive beside what is saved: gradients of two branches' results, dq of the window and of this branch (summed over
    rounds in fp32 over several ranks), gradients of K/V, and the kernels' workspace.
    """
    q, out = _query_elements(shape)
    kv = shape.plan.tokens_per_rank * shape.heads.row_elements
    rounds = 8 * q if shape.plan.cp_size > 1 else 0
    return (out + 2 * q) * shape.element_bytes + rounds + kv * (shape.element_bytes + 8) + workspace_bytes(shape)


def core_peak_bytes(shape: Shape) -> int:
    """Peak of the core on one rank over its inputs, its output and their gradients: the benchmark's `peak GiB`."""
    q, _ = _query_elements(shape)
    kv = shape.plan.tokens_per_rank * shape.heads.row_elements
    own_gradients = q * shape.element_bytes + kv * (shape.element_bytes + 8)
    return _results_bytes(shape) + selected_backward_bytes(shape) - own_gradients


def workspace_bytes(shape: Shape) -> int:
    """Partial results of the selected branch's kernels: as many key/value heads at once as fit, or a part of one."""
    heads = shape.heads
    group = heads.num_q_heads // heads.num_kv_heads
    head = shape.plan.tokens_per_rank * group * shape.config.nsa.num_slc_blocks * (
        heads.dim_v * shape.element_bytes + 8
    )  # fmt: skip
    at_once = min(heads.num_kv_heads, WORKSPACE_BYTES // head)
    return head * at_once if at_once else WORKSPACE_BYTES


def _query_elements(shape: Shape) -> tuple[int, int]:
    """Numbers of q and of the output, of one sequence: the core takes one after the other."""
    rows = shape.plan.tokens_per_rank * shape.heads.num_q_heads
    return rows * shape.heads.dim_k, rows * shape.heads.dim_v


def _ends_bytes(shape: Shape, stage: int) -> int:
    """Token ids before the first layer; the final norm, targets and mask after the last."""
    norm = (2 * shape.config.model.hidden_size * shape.element_bytes + 4) * shape.norm_share
    first, last = stage == 0, stage == shape.num_stages - 1
    return int(shape.tokens * (8 * first + (norm + 9) * last))
