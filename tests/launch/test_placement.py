"""Groups of consecutive ranks must lie in one NVLink domain; what the ranks tell each other arrives in their order."""

import pytest
import torch

from nsa_launch.ranks.placement import RankPlace, check, exchange, violations
from ranks import run_ranks


def places(domains: str) -> list[RankPlace]:
    return [RankPlace(rank, "host", 100 + rank, "node", domain, "cpu") for rank, domain in enumerate(domains)]


@pytest.mark.parametrize(("domains", "group_size"), [("aabb", 2), ("aaaa", 4), ("abcd", 1), ("aaabbb", 3)])
def test_groups_inside_a_domain_pass(domains, group_size):
    check(places(domains), group_size)


def test_the_ranks_of_a_split_group_are_named():
    assert violations(places("aabbab"), 2) == ["ranks 4..5 lie in 2 domains: a, b"]
    with pytest.raises(ValueError, match=r"ranks 0\.\.3 lie in 2 domains: a, b.*launch\.allow_split_groups=true"):
        check(places("aabb"), 4)


def _exchange(rank: int) -> list[RankPlace]:
    mine = RankPlace(rank, f"höst{rank}", 100 + rank, "node", "domain" * (rank + 1), "cpu")
    return exchange(mine, torch.device("cpu"))


def test_every_rank_learns_every_place():
    answers = run_ranks(2, _exchange)
    assert (
        answers[0]
        == answers[1]
        == [
            RankPlace(0, "höst0", 100, "node", "domain", "cpu"),
            RankPlace(1, "höst1", 101, "node", "domaindomain", "cpu"),
        ]
    )
