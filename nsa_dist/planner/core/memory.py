"""Bytes that one layer's attention needs on a rank: what it saves, and the moments in which most is alive.

Every term is a buffer of `nsa_dist.branches` and of what it calls. Backward works head group by head group; what
decides is one of three moments:

    forward     the last selected attention: results of all branches so far, pages, the kernels' workspace
    deltas      the output and the results of all branches, before the latter are freed
    group       the selected branch's backward of a head group: everything of it, and what the groups before left
"""

from dataclasses import dataclass

from nsa_dist.cp.formulas import cost
from nsa_dist.planner.core.sizes import Core
from nsa_dist.planner.core.strategies import (
    BRANCHES,
    COMPRESS_EVERYTHING,
    Options,
    Strategy,
    head_groups,
    held_bytes,
    num_rounds,
    page_bytes,
    page_counts,
)
from nsa_dist.planner.core.workspace import is_cut, slc_workspace_bytes


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors that everything else is made of; `e` of a number, `g` of one that is summed."""

    q: int  # queries, or their gradient
    out: int  # the result of one branch, or of the layer
    kv: int  # keys and values of one branch
    lse: int  # softmax statistics of one branch
    e: int
    g: int

    @classmethod
    def of(cls, core: Core) -> "Sizes":
        heads, rows = core.heads, core.tokens * core.heads.num_q_heads
        e = heads.element_bytes
        kv = core.tokens * heads.row_elements * e
        return cls(rows * heads.dim_k * e, rows * heads.dim_v * e, kv, rows * 4, e, heads.grad_bytes)


def inputs_bytes(core: Core, num_pairs: int = BRANCHES) -> int:
    """Queries, keys and values of the branches or the pair that they share, gates, the gradient of the output."""
    sizes = Sizes.of(core)
    gates = core.tokens * core.heads.num_q_heads * 3 * sizes.e
    return sizes.q + num_pairs * sizes.kv + gates + sizes.out


def layer_peak_bytes(core: Core, strategy: Strategy, options: Options) -> int:
    """Peak of one layer's forward and backward by itself, inputs, output and its gradient counted."""
    saved = statistics_bytes(core)
    if strategy.how not in COMPRESS_EVERYTHING:  # which gather and compress anew in backward
        saved += extended_bytes(core) + compressed_bytes(core)
    moment = largest_moment(core, strategy, options)
    inputs = inputs_bytes(core, 1 if strategy.how == "shared all-gather" else BRANCHES)
    return inputs + Sizes.of(core).out + saved + moment.work + moment.remote


def statistics_bytes(core: Core) -> int:
    """Softmax statistics of the branches and the chosen blocks, saved until the layer's backward is over."""
    chosen = core.tokens * core.heads.num_kv_heads * core.cfg.num_slc_blocks * 4
    return BRANCHES * Sizes.of(core).lse + chosen


def extended_bytes(core: Core) -> int:
    """Copies of the compressed and the window branch's K/V with their halos, saved; one rank needs none."""
    if core.plan.cp_size == 1:
        return 0
    halos = [max(map(sum, cost.halo_rows(core.plan, length))) for length in cost.halo_lengths(core.cfg)]
    return (2 * core.tokens + sum(halos)) * core.heads.row_elements * core.heads.element_bytes


def compressed_bytes(core: Core) -> int:
    """Compressed K and V of the whole sequence, and of the own blocks what phi saves and makes.

    Its MLP saves its hidden values before the activation in fp32 and after it.
    """
    cfg, heads = core.cfg, core.heads
    own = max(cost.own_cmp_blocks(core.plan, cfg, rank) for rank in range(core.plan.cp_size))
    hidden = own * heads.num_kv_heads * sum(core.phi_hidden_dims) * (4 + heads.element_bytes)
    blocks = cost.total_cmp_blocks(core.plan, cfg) + (own if core.plan.cp_size > 1 else 0)
    return hidden + blocks * heads.row_elements * heads.element_bytes


def results_bytes(core: Core) -> int:
    """Results of the three branches, alive from the forward until backward has their deltas."""
    return BRANCHES * Sizes.of(core).out


@dataclass(frozen=True)
class Moment:
    """What is alive beside inputs, output and what is saved all the time."""

    work: int
    remote: int  # K/V of other ranks, and their gradients

    @property
    def total(self) -> int:
        return self.work + self.remote


def largest_moment(core: Core, strategy: Strategy, options: Options) -> Moment:
    """The fullest of the three moments. In the first the output is not there yet, and is taken off."""
    groups, sizes = head_groups(core, options), Sizes.of(core)
    if strategy.how == "shared all-gather" and core.plan.cp_size > 1:
        groups = core.heads.num_kv_heads
    heads = -(-core.heads.num_kv_heads // groups)
    deltas = core.tokens * core.heads.num_q_heads * BRANCHES * 4
    forward = results_bytes(core) - sizes.out + slc_workspace_bytes(core, heads, forward=True)
    pages, rounds = held_bytes(core, strategy, options), num_rounds(core, strategy, options)
    if strategy.how == "raw all-gather":
        backward = [_gathered_bytes(core)]
    elif strategy.how == "shared all-gather" and core.plan.cp_size > 1:
        backward = [_gathered_head_bytes(core)]
    else:
        backward = [_group_bytes(core, number, groups, rounds) for number in range(groups)]
    held = held_bytes(core, strategy, options, forward=True)
    moments = [
        Moment(forward, held),
        Moment(results_bytes(core) + deltas, 0 if strategy.how == "shared all-gather" else held // 3),
        *(Moment(work + deltas, pages) for work in backward),
    ]
    return max(moments, key=lambda moment: moment.total)


def _group_bytes(core: Core, number: int, groups: int, rounds: int) -> int:
    """Backward of the selected branch of head group `number`, after its compressed branch.

    The gradient of q of all groups is filled as they come; dq of this group by two branches, the second in fp32 over
    ranks; sums of keys and values of this and the earlier groups; the window's of the earlier ones; gradients of
    compressed K and V, of the whole sequence, that wait for the end on their way home. A second round has dq, sums and
    chosen blocks of its own beside those it is added to.
    """
    sizes, heads = Sizes.of(core), -(-core.heads.num_kv_heads // groups)
    several = core.plan.cp_size > 1
    of_q, of_kv = sizes.q // groups, sizes.kv // groups
    wide = sizes.g if several else sizes.e
    dq = of_q + of_q // sizes.e * wide
    sums = (number + 1) * of_kv // sizes.e * (sizes.g if several or is_cut(core) else sizes.e)
    if rounds > 1:
        own = (of_q + of_kv) // sizes.e * sizes.g
        return _group_bytes(core, number, groups, 1) + own + core.tokens * heads * core.cfg.num_slc_blocks * 4
    compressed = (number + 1) * cost.total_cmp_blocks(core.plan, core.cfg) * core.heads.row_elements // groups * wide
    return sizes.q + dq + sums + number * of_kv // sizes.e * wide + compressed + slc_workspace_bytes(core, heads)


def _gathered_bytes(core: Core) -> int:
    """The same on gathered K/V: all heads at once, after the window branch, whose dq and own dK, dV are there."""
    sizes = Sizes.of(core)
    return 2 * sizes.q + sizes.kv // sizes.e * sizes.g + slc_workspace_bytes(core, core.heads.num_kv_heads)


def _gathered_head_bytes(core: Core) -> int:
    """The same on one gathered head, the last: own dK, dV of all heads; then the selected branch's dq in fp32 and
    workspace, or two dq and the gradients of K and V of the whole sequence by the window, which are yet to be added."""
    sizes, heads = Sizes.of(core), core.heads.num_kv_heads
    of_sequence = core.plan.cp_size * sizes.kv // heads // sizes.e * sizes.g
    of_q = sizes.q // heads
    selected, window = of_q // sizes.e * sizes.g + slc_workspace_bytes(core, 1), 2 * of_q + of_sequence
    return sizes.q + sizes.kv // sizes.e * sizes.g + max(selected, window)


def kept_page_bytes(core: Core, strategy: Strategy) -> int:
    """Pages of one layer that wait for their backward when they are not fetched again."""
    most = max(map(sum, page_counts(core, strategy)))
    return most * page_bytes(core, core.heads.element_bytes)
