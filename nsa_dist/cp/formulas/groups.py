"""In how many groups the kv heads of a call travel: by a model of its seconds, from sizes and measured constants alone.

Forward and backward of one layer with G groups, each of which travels under the computation of the one before:

    T(G)        max(C + G * stage_s + exposed, host_s + G * host_stage_s)
    exposed     max(s W, W - (1 - s) C)     what no computation hides, the first group's in any case; s: the share of
                the heads that the largest group has
    C           compressed attention, selection and selected attention: FLOPs (`work`) over rates
    W           all that a rank may fetch, over the link: pages, once more in backward, and their gradients in fp32

The smallest T counts, and of equals the fewer groups. The choice is every rank's, as it knows sizes only: u, which
depends on the data, is taken as 1. The constants are an H200's; `FetchOptions.link_gb_per_s` is of any link.
"""

from itertools import pairwise
from typing import NamedTuple

from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.cost import HeadSizes, pieces
from nsa_dist.cp.formulas.work import RankWork, backward_flops, cmp_keys_below, forward_flops, slc_keys_below
from nsa_dist.cp.options import FetchOptions
from nsa_dist.cp.plan import ShardPlan

MOST_GROUPS = 4  # more were not measured, and a kernel over one of sixteen heads does not fill a GPU


class GroupCosts(NamedTuple):
    """Seconds and rates of forward and backward together, where nothing else is said.

    link_bytes_per_s    that a rank sends: 268 MB all-to-all among four H200s, NCCL, 2026-11-28 (measured/four-gpus)
    stage_s             that a group adds to the device's time: 2,048 tokens a rank on two H200s, captured, 3.1 ms in
                        four groups and 1.5 in one, 2026-11-30 (docs/decisions/one-sided)
    host_s              of the host without groups' lists of pages: three pairs gathered, 2k to 16k tokens, the same run
    host_stage_s        that a group adds to it: all-to-all less three pairs gathered, over four groups, the same run
    forward, backward   FLOP/s of the branches cmp, select and slc: one H200, 64k tokens, Hq 64, Hkv 4, D 128, bf16
                        (nsa_dist/planner/clusters/h200-8.yaml)
    """

    link_bytes_per_s: float = 153.3e9
    stage_s: float = 0.5e-3
    host_s: float = 10e-3
    host_stage_s: float = 5.4e-3
    forward: tuple[float, float, float] = (574.7e12, 407.9e12, 172.8e12)
    backward: tuple[float, float, float] = (410.3e12, 407.9e12, 240.3e12)


H200 = GroupCosts()


def num_head_groups(
    plan: ShardPlan, cfg: NSAConfig, heads: HeadSizes, fetch: FetchOptions, *, in_line: bool = False,
    costs: GroupCosts = H200,
) -> int:  # fmt: skip
    """Groups in which the kv heads of a rank travel, 1 to Hkv: `fetch.head_groups`, or those of the least T.

    in_line     nothing travels under anything: one group, if no number is asked for

    Under `fetch.kv_fetch_budget_bytes` only numbers count with which a group's pages fit into one round, if there are
    any: else pages go in rounds, whatever the number, and never take more than the budget.
    """
    if plan.cp_size == 1:
        return 1
    if fetch.head_groups is not None:
        return min(heads.num_kv_heads, fetch.head_groups)
    if in_line:
        return 1
    if fetch.link_gb_per_s is not None:
        costs = costs._replace(link_bytes_per_s=1e9 * fetch.link_gb_per_s)
    key = ("num_head_groups", cfg, heads, fetch, costs)
    return plan.memo(key, lambda: _of_least_time(plan, cfg, heads, fetch, costs))


def group_seconds(
    num_groups: int, plan: ShardPlan, cfg: NSAConfig, heads: HeadSizes, fetch: FetchOptions, costs: GroupCosts = H200
) -> float:
    """T of so many groups."""
    compute_s, wire_s = _compute_s(plan, cfg, heads, costs), _wire_s(plan, heads, fetch, costs)
    share = -(-heads.num_kv_heads // num_groups) / heads.num_kv_heads
    exposed_s = max(wire_s * share, wire_s - compute_s * (1 - share))
    device_s = compute_s + num_groups * costs.stage_s + exposed_s
    return max(device_s, costs.host_s + num_groups * costs.host_stage_s)


def _of_least_time(
    plan: ShardPlan, cfg: NSAConfig, heads: HeadSizes, fetch: FetchOptions, costs: GroupCosts
) -> int:  # fmt: skip
    every = range(1, min(MOST_GROUPS, heads.num_kv_heads) + 1)
    page_bytes = plan.block_len * (heads.dim_k + heads.dim_v) * heads.element_bytes
    at_once = fetch.round_pages(page_bytes, fetch.domain_of(plan.cp_size))
    blocks = -(-_remote_tokens(plan) // plan.block_len)
    fitting = [count for count in every if at_once is None or blocks * -(-heads.num_kv_heads // count) <= at_once]
    return min(fitting or every, key=lambda count: (group_seconds(count, plan, cfg, heads, fetch, costs), count))


def _remote_tokens(plan: ShardPlan) -> int:
    """Of the documents of a rank, those of others; of the rank that has most."""
    lengths = [stop - start for start, stop in pairwise(plan.cu_seqlens)]

    def of_rank(rank: int) -> int:
        own = pieces(plan, rank)
        return sum(lengths[document] for document in {p.document for p in own}) - sum(p.stop - p.start for p in own)

    return plan.memo(("remote_tokens",), lambda: max(map(of_rank, range(plan.cp_size))))


def _wire_s(plan: ShardPlan, heads: HeadSizes, fetch: FetchOptions, costs: GroupCosts) -> float:
    trips = 1 if fetch.keep_pages else 2
    number_bytes = trips * heads.element_bytes + heads.grad_bytes
    return _remote_tokens(plan) * heads.row_elements * number_bytes / costs.link_bytes_per_s


def _compute_s(plan: ShardPlan, cfg: NSAConfig, heads: HeadSizes, costs: GroupCosts) -> float:
    """Of a rank that has an even share of the work."""
    lengths = [stop - start for start, stop in pairwise(plan.cu_seqlens)]
    keys = [sum(below(length, cfg) for length in lengths) for below in (cmp_keys_below, slc_keys_below)]
    work = RankWork(cmp_keys=keys[0], slc_keys=keys[1], win_keys=0, own_cmp_blocks=0)
    seconds = 0.0
    for flops, rates in ((forward_flops, costs.forward), (backward_flops, costs.backward)):
        of_branch = flops(work, heads, cfg, ())
        seconds += sum(of_branch[name] / rate for name, rate in zip(("cmp", "select", "slc"), rates, strict=True))
    return seconds / plan.cp_size
