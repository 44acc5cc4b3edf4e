"""Ranks in domains: what they send, counted from the blocks that they chose, one by one; and real processes of them."""

import traceback

import torch

from cases import SMALL, make_inputs, run
from cp_cases import PAGE_BYTES, compare, make_plan
from nsa_dist import ShardPlan
from nsa_dist.cp.options import FetchOptions
from ranks import groups_up_to


def crossing(plan: ShardPlan, block_indices, domain_size: int) -> list[int]:
    """Pages that each rank sends to other domains in one forward: each to a domain once if somebody there chose it."""
    owner = plan.owner(torch.arange(plan.num_blocks) * plan.block_len)[0].tolist()
    counts = [0] * plan.cp_size
    for first in range(0, plan.cp_size, domain_size):
        domain = range(first, first + domain_size)
        chosen = {
            (head, block)
            for rank in domain
            for head in range(block_indices[rank].shape[1])
            for block in set(block_indices[rank][:, head].flatten().tolist()) - {-1}
        }
        for _, block in chosen:
            counts[owner[block]] += owner[block] not in domain
    return counts


RANKS = 6
GROUPS = [(4, 2), (6, 3), (6, 2)]  # ranks, of them in a domain
CASES = ("packed", "in rounds")


def agreement(rank: int) -> dict[tuple, str]:
    """{(case, group): "" or what went wrong on this rank}, over gloo."""
    groups, found = groups_up_to(RANKS), {}
    for name in CASES:
        lengths = [90, 33, 40]
        inputs = make_inputs(sum(lengths), 4, 2)
        budget = 5 * PAGE_BYTES if name == "in rounds" else None
        expected = run(inputs, SMALL, lengths)
        for size, domain_size in GROUPS:
            if rank >= size:
                continue
            plan = make_plan("zigzag", lengths, size, SMALL)
            options = FetchOptions(kv_fetch_budget_bytes=budget, domain_size=domain_size)
            got, again = (run(inputs, SMALL, lengths, plan, rank, groups[size], fetch=options) for _ in range(2))
            same = all(torch.equal(a, b) for a, b in zip(got[2], again[2], strict=True))
            for grad in got[3]:  # phi's parameters: every rank has its part
                torch.distributed.all_reduce(grad, group=groups[size])
            try:
                compare(got, expected, plan, rank)
                found[name, size, domain_size] = "" if same else "gradients differ from run to run"
            except AssertionError:
                found[name, size, domain_size] = traceback.format_exc(limit=2)
    return found
