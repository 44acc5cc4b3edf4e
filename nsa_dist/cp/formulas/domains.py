"""Pages of ranks that form domains (`cp.sent`): how many enter each domain, and how many are passed on in it.

Given what was chosen the counts are exact. A model of it takes the choices of a domain's ranks as independent: of the
blocks that they can see together, each rank chose some at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nsa_dist.cp.formulas.cost import HeadSizes, Matrix, chosen_at, seen_blocks, wanted_blocks
from nsa_dist.cp.plan import ShardPlan


@dataclass(frozen=True)
class DomainPages:
    """counts[r][q]: pages that rank r gets from rank q in one forward; from itself none."""

    between: Matrix  # its share of what its domain chose outside, from the owners
    inside: Matrix  # what it chose, from its owner in the domain, or from the rank whose share it was
    listed: list[int]  # of every domain: what its ranks chose together, of each other's pages, too


def domain_pages_of(
    plan: ShardPlan, block_indices: Sequence[Tensor], domain_size: int, num_head_groups: int
) -> DomainPages:
    """For given choices: every rank's `block_indices` as `nsa_attention` returns them.

    num_head_groups     `FetchOptions.num_head_groups`: shares are dealt anew in each
    """
    size = plan.cp_size
    chosen = wanted_blocks(plan, block_indices)  # [P, P owners, h, own]
    between, inside = (torch.zeros(size, size, dtype=torch.int64) for _ in range(2))
    num_heads, listed = chosen.shape[2], [0] * (size // domain_size)
    bounds = [num_heads * i // num_head_groups for i in range(num_head_groups + 1)]
    for first in range(0, size, domain_size):
        domain = range(first, first + domain_size)
        outside = [owner for owner in range(size) if owner not in domain]
        for a, b in pairwise(bounds):
            union = chosen[first : first + domain_size, :, a:b].any(0)  # [P, h, own]
            listed[first // domain_size] += int(union.sum())
            holder = torch.arange(size)[:, None, None].expand_as(union).clone()  # who passes each page on
            far = union[outside]
            holder[outside] = first + (far.flatten().cumsum(0) - 1).view_as(far) % domain_size
            for rank in domain:
                share = union & (holder == rank)
                between[rank, outside] += share[outside].sum((1, 2))
                got = holder[chosen[rank, :, a:b]]
                inside[rank] += torch.bincount(got, minlength=size)
                inside[rank, rank] = 0
    return DomainPages(between.tolist(), inside.tolist(), listed)


def domain_pages_at(plan: ShardPlan, heads: HeadSizes, union_fraction: float, domain_size: int) -> DomainPages:
    """When every rank's queries choose the fraction u of the remote blocks (`cost.pages_at`), independently of others.

    Of the blocks of an owner that a domain's ranks see together, its union misses those that none of them chose.
    """
    size, num_heads = plan.cp_size, heads.num_kv_heads
    chosen = torch.tensor(chosen_at(plan, union_fraction), dtype=torch.float64)  # [P, P]: blocks of a head
    seen = torch.tensor(_seen_together(plan, domain_size), dtype=torch.float64)  # [G, P]
    share = (chosen.unflatten(0, (-1, domain_size)) / seen.clamp(min=1)[:, None]).clamp(max=1)
    of_domain = torch.arange(size) // domain_size
    near = of_domain[:, None] == of_domain
    union = ((1 - (1 - share).prod(1)) * seen).round() * num_heads
    between = (union / domain_size).ceil().repeat_interleave(domain_size, 0).masked_fill(near, 0)
    passed = (chosen.masked_fill(near, 0).sum(1) * num_heads / domain_size).round()
    inside = (chosen.round() * num_heads + passed[:, None]).masked_fill(~near, 0).fill_diagonal_(0)
    return DomainPages(between.long().tolist(), inside.long().tolist(), union.sum(1).long().tolist())


def _seen_together(plan: ShardPlan, domain_size: int) -> Matrix:
    """Selection blocks of each rank that some query of each domain may choose."""
    domains = [range(first, first + domain_size) for first in range(0, plan.cp_size, domain_size)]
    return plan.memo(("seen together", domain_size), lambda: [seen_blocks(plan, domain) for domain in domains])
