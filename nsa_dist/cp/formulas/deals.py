"""Tokens of a row that was cut wherever it was long enough, on their way to the ranks of their blocks and back."""

from collections.abc import Sequence

from nsa_dist.cp.formulas.cost import pieces
from nsa_dist.cp.plan import ShardPlan


def dealt_tokens(given: ShardPlan, plan: ShardPlan) -> list[tuple[int, int]]:
    """(tokens that it was given and `plan` has elsewhere, tokens that come to it) of every rank.

    Both plans are of the same tokens in packed order.
    """
    found = []
    for rank in range(plan.cp_size):
        had, wanted = _intervals(given, rank), _intervals(plan, rank)
        stay = _overlap(had, wanted)
        found.append((_total(had) - stay, _total(wanted) - stay))
    return found


def dealt_bytes(
    given: ShardPlan, plan: ShardPlan, projected: int, attended: int, element_bytes: int
) -> list[dict[str, int]]:
    """What each rank sends of them in one forward and backward of one layer, as `Traffic.sent_bytes` counts it.

    projected, attended     numbers of a token on its way there, and on its way back
    """
    return [
        {
            "tokens": (leave * projected + come * attended) * element_bytes,
            "tokens.grad": (come * projected + leave * attended) * element_bytes,
        }
        for leave, come in dealt_tokens(given, plan)
    ]


def _intervals(plan: ShardPlan, rank: int) -> list[tuple[int, int]]:
    """Of the packed sequence, ascending."""
    return [(plan.cu_seqlens[p.document] + p.start, plan.cu_seqlens[p.document] + p.stop) for p in pieces(plan, rank)]


def _total(intervals: Sequence[tuple[int, int]]) -> int:
    return sum(b - a for a, b in intervals)


def _overlap(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> int:
    """Length of what is in both; both ascend."""
    i = j = total = 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total
