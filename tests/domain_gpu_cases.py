"""Ranks in domains with a GPU each: what tests/cp/test_domains_gpu.py runs."""

import torch
import torch.distributed as dist

from cp_gpu_cases import NAMES, attend, make_inputs
from nsa_dist import ShardPlan
from nsa_dist.cp.options import FetchOptions

DOMAIN = 2
CASES = {"at once": {}, "in rounds": {"kv_fetch_budget_bytes": 2**22}, "pages kept": {"keep_pages": True}}


def compare(rank: int) -> dict[str, dict]:
    """By case: what has the bits of one rank, what repeats, how far the others are."""
    size, lengths, found = dist.get_world_size(), [20000, 31, 5000, 7737], {}
    leaves, phis, weight = make_inputs(sum(lengths), 16, 4, 128)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    out, ids, grads = attend(leaves, phis, weight, bounds)
    plan = ShardPlan.zigzag(bounds, size)
    real = ~plan.padding(rank).cuda()
    one = [plan.shard(x, rank)[real] for x in (out, *grads)]
    for name, options in CASES.items():
        fetch = FetchOptions(domain_size=DOMAIN, **options)

        def run(fetch=fetch):
            got = attend(leaves, phis, weight, bounds, plan, rank, dist.group.WORLD, fetch)
            return got[1][real], [x[real] for x in (got[0], *got[2])]

        (chosen, got), (_, again) = run(), run()
        pairs = list(zip(NAMES, got, one, strict=True))
        found[name] = {
            "ids": torch.equal(chosen.long(), plan.shard(ids.long() + 1, rank)[real] - 1),
            "same": [n for n, a, b in pairs if torch.equal(a, b)],
            "repeats": [n for n, a, b in zip(NAMES, got, again, strict=True) if torch.equal(a, b)],
            "errors": {n: float((a.float() - b.float()).norm() / b.float().norm()) for n, a, b in pairs},
        }
    return found
