"""When fetching pays: for every context-parallel size up to which u it is quicker than gathering; what it saves."""

from dataclasses import dataclass

from nsa_dist.planner.core.strategies import GIB
from nsa_dist.planner.sweep import Candidate, Plan
from nsa_dist.planner.verdict import break_even

HEADINGS = ("GPUs of a sequence", "quicker than all-gather", "than three pairs gathered")


@dataclass(frozen=True)
class Fetching:
    """One size. `saved` is the share of a step against raw all-gather, held the remote K/V at once, by u."""

    cp_size: int
    even_gather: float  # the largest u at which fetching is as quick as an all-gather of the selected branch's K/V
    even_raw: float  # the same against the raw K/V of all branches, three pairs
    saved: dict[float, float]
    held_bytes: dict[float, int]
    raw_held_bytes: int  # three pairs, a branch at a time
    shared_held_bytes: int  # one pair of a model with shared K/V, a head at a time


def fetching(plan: Plan) -> list[Fetching]:
    """Of every size with several ranks."""
    return [_of(plan, candidate) for candidate in plan.candidates if candidate.cp_size > 1]


def markdown(plan: Plan) -> str:
    """The table as it stands in docs/explained/fetching.md; last, what two other ways hold."""
    us = plan.options.union_fractions
    head = [
        *HEADINGS,
        *(f"saved at u={u:g}" for u in us),
        *(f"GiB held at u={u:g}" for u in us),
        "three pairs, GiB",
        "one pair by heads, GiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in fetching(plan)]
    return "\n".join(lines)


def cells(row: Fetching) -> list[str]:
    return [
        str(row.cp_size),
        _up_to(row.even_gather),
        _up_to(row.even_raw),
        *(f"{100 * saved:.1f}%" for saved in row.saved.values()),
        *(f"{held / GIB:.2f}" for held in row.held_bytes.values()),
        f"{row.raw_held_bytes / GIB:.1f}",
        f"{row.shared_held_bytes / GIB:.1f}",
    ]


def _of(plan: Plan, candidate: Candidate) -> Fetching:
    raw = candidate.outcome("raw all-gather")
    fetches = {o.strategy.union_fraction: o for o in candidate.outcomes if o.strategy.union_fraction is not None}
    return Fetching(
        cp_size=candidate.cp_size,
        even_gather=break_even(plan, candidate, "all-gather"),
        even_raw=break_even(plan, candidate, "raw all-gather"),
        saved={u: 1 - o.time.total_s / raw.time.total_s for u, o in fetches.items()},
        held_bytes={u: o.held_bytes for u, o in fetches.items()},
        raw_held_bytes=raw.held_bytes,
        shared_held_bytes=candidate.outcome("shared all-gather").held_bytes,
    )


def _up_to(u: float) -> str:
    return "never" if u == 0 else "always" if u == 1 else f"u < {u:.2f}"
