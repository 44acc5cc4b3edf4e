"""Ranks in domains by the planner: what crosses, how long it takes and what is held."""

from dataclasses import replace

import pytest

from nsa_dist import ShardPlan
from nsa_dist.cp.formulas import cost
from nsa_dist.cp.formulas.domains import domain_pages_at
from nsa_dist.cp.options import FetchOptions
from nsa_dist.planner.core.strategies import Options, Strategy, held_bytes, num_rounds, page_bytes
from nsa_dist.planner.core.time import wire_s
from nsa_dist.planner.sweep import make_plan
from nsa_dist.planner.verdict import verdict
from planner_cases import cluster, long_config

HEADS = cost.HeadSizes(64, 4, 128, 128)
NODES = cluster().model_copy(update={"num_nodes": 4})


@pytest.mark.parametrize("u", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("size", "domain_size"), [(16, 8), (32, 8), (12, 4), (6, 3)])
def test_no_more_enters_a_domain_than_gathering_sends_it(size, domain_size, u):
    plan = ShardPlan.zigzag([0, 2**18], size)
    shard = plan.tokens_per_rank // plan.block_len * HEADS.num_kv_heads
    found, alone = domain_pages_at(plan, HEADS, u, domain_size), cost.pages_at(plan, HEADS, u)
    for first in range(0, size, domain_size):
        ranks = range(first, first + domain_size)
        entering = sum(sum(found.between[rank]) for rank in ranks)
        assert entering <= shard * (size - domain_size) + size * domain_size  # shares are rounded up to whole pages
        outside = [q for q in range(size) if q not in ranks]
        assert entering <= sum(alone[rank][q] for rank in ranks for q in outside) + size * domain_size
        assert not any(found.between[rank][q] for rank in ranks for q in ranks)
        assert not any(found.inside[rank][q] for rank in ranks for q in outside)


def test_the_first_domain_sees_everything_and_fetches_it_once():
    plan = ShardPlan.zigzag([0, 2**18], 16)
    found = domain_pages_at(plan, HEADS, 1.0, 8)
    assert sum(map(sum, found.between[:8])) == 4 * plan.num_blocks // 2
    assert found.listed[0] == pytest.approx(4 * plan.num_blocks, rel=0.01)


def in_domains(u: float, domain_size: int | None = 8, budget: int | None = None):
    options = Options((u,), FetchOptions(kv_fetch_budget_bytes=budget, domain_size=domain_size))
    return make_plan(long_config(), NODES, options, [32])


def test_pages_cross_the_slow_link_once_a_node():
    alone, domains = (in_domains(1.0, size).candidates[0].judged for size in (None, 8))
    most = domains.sent_bytes["pages"] * 31 / 3  # to other ranks, to other domains
    assert domains.sent_bytes["pages"] * 5 < alone.sent_bytes["pages"] <= most
    assert domains.time.total_s < alone.time.total_s
    crossing, inside = domains.time.wire_s["pages"], domains.time.wire_s["pages.inside"]
    assert 0 < crossing + inside < alone.time.wire_s["pages"]


def test_a_domain_over_two_nodes_passes_on_over_the_slow_link():
    core = in_domains(1.0).candidates[0].shape.core
    near, far = (
        wire_s(core, Strategy("fetch", 1.0), Options(fetch=FetchOptions(domain_size=size)), NODES).forward
        for size in (8, 16)
    )
    assert far["pages.inside"] > 2 * near["pages.inside"]


def test_shares_are_held_beside_pages_and_fit_in_the_budget():
    core, strategy = in_domains(1.0).candidates[0].shape.core, Strategy("fetch", 1.0)
    free, alone = Options(fetch=FetchOptions(domain_size=8)), Options()
    assert 1.05 < held_bytes(core, strategy, free) / held_bytes(core, strategy, alone) < 1.2
    budget = 64 * page_bytes(core, 2)
    bound = replace(free, fetch=replace(free.fetch, kv_fetch_budget_bytes=budget))
    assert held_bytes(core, strategy, bound, forward=True) <= 3 * budget // 2
    assert num_rounds(core, strategy, bound) > num_rounds(core, strategy, replace(bound, fetch=FetchOptions(budget)))


@pytest.mark.parametrize(("domain_size", "said"), [(None, "With parallel.domain_size=8"), (8, "in domains of 8 ranks")])
def test_the_verdict_speaks_of_domains_between_nodes(domain_size, said):
    assert any(said in sentence for sentence in verdict(in_domains(1.0, domain_size)))
    assert not any("domain" in sentence for sentence in verdict(make_plan(long_config(), cluster(), None, [8])))
