"""Bytes that one layer's attention needs on a rank at its peak: a sum of the buffers alive in that moment."""

from nsa_dist.cp import cost
from nsa_dist.train.planner.core import Core
from nsa_dist.train.planner.strategies import Options, Strategy, held_bytes, page_bytes, page_counts

# The selected branch's kernels work in chunks of queries so that their workspace stays below this.
WORKSPACE_BYTES = 2 * 2**30


def compressed_bytes(core: Core) -> int:
    """Compressed K and V of the whole sequence, and of the own blocks what phi's MLPs save."""
    cfg = core.cfg
    own = max(cost.own_cmp_blocks(core.plan, cfg, rank) for rank in range(core.plan.cp_size))
    hidden = own * core.heads.num_kv_heads * sum(core.phi_hidden_dims)
    rows = cost.total_cmp_blocks(core.plan, cfg) * core.heads.row_elements
    return (rows + hidden) * core.heads.element_bytes


def results_bytes(core: Core) -> int:
    """Out and log-sum-exp of every branch and the chosen blocks, of one sequence."""
    heads = core.heads
    per_token = 3 * heads.num_q_heads * (heads.dim_v * core.heads.element_bytes + 4)
    return core.tokens * (per_token + heads.num_kv_heads * core.cfg.num_slc_blocks * 4)


def kept_page_bytes(core: Core, strategy: Strategy) -> int:
    """Pages of one layer that wait for their backward when they are not fetched again."""
    most = max(map(sum, page_counts(core, strategy)))
    return most * page_bytes(core, core.heads.element_bytes)


def selected_backward_bytes(core: Core) -> int:
    """Backward of the selected branch, the window's being done and its result let go.

    Alive beside what is saved: gradients of two branches' results, dq of the window and of this branch (summed over
    rounds in fp32 over several ranks), gradients of K/V, and the kernels' workspace.
    """
    q, out = query_elements(core)
    kv = core.tokens * core.heads.row_elements
    rounds = 8 * q if core.plan.cp_size > 1 else 0
    e = core.heads.element_bytes
    return (out + 2 * q) * e + rounds + kv * (e + 8) + workspace_bytes(core)


def core_peak_bytes(core: Core) -> int:
    """Peak of the core on one rank over its inputs, its output and their gradients: the benchmark's `peak GiB`."""
    q, _ = query_elements(core)
    kv = core.tokens * core.heads.row_elements
    own_gradients = q * core.heads.element_bytes + kv * (core.heads.element_bytes + 8)
    return results_bytes(core) + selected_backward_bytes(core) - own_gradients


def layer_peak_bytes(core: Core, strategy: Strategy, options: Options) -> int:
    """Of one layer's forward and backward, inputs and the gradient of the output counted."""
    q, out = query_elements(core)
    heads, e = core.heads, core.heads.element_bytes
    inputs = (q + out + core.tokens * (3 * heads.row_elements + 3 * heads.num_q_heads)) * e
    return (
        inputs
        + results_bytes(core)
        + compressed_bytes(core)
        + selected_backward_bytes(core)
        + held_bytes(core, strategy, options)
    )


def workspace_bytes(core: Core) -> int:
    """Partial results of the selected branch's kernels: as many key/value heads at once as fit, or a part of one."""
    heads = core.heads
    head = core.tokens * core.group * core.cfg.num_slc_blocks * (heads.dim_v * heads.element_bytes + 8)
    at_once = min(heads.num_kv_heads, WORKSPACE_BYTES // head)
    return head * at_once if at_once else WORKSPACE_BYTES


def query_elements(core: Core) -> tuple[int, int]:
    """Numbers of q and of the output, of one sequence: the core takes one after the other."""
    rows = core.tokens * core.heads.num_q_heads
    return rows * core.heads.dim_k, rows * core.heads.dim_v
