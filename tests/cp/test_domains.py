"""Ranks in domains, which a page enters once, in fp64 against one rank to 1e-10; and the bytes that cross.

Ranks are threads here; over real processes: test_domain_ranks.py.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import SMALL, make_inputs, run
from cp.test_cases import PAGE_BYTES, check, one_rank
from cp.test_schedule import Watched
from cp_cases import CASES, FETCH, LAYOUTS, forced_selection, make_plan
from domain_cases import GROUPS, crossing
from nsa_dist.cp.comm import Traffic
from nsa_dist.cp.formulas import cost
from nsa_dist.cp.formulas.domains import domain_pages_of
from nsa_dist.cp.options import FetchOptions
from thread_mailboxes import run_readers
from thread_ranks import run_threads

SHARED = [name for name in CASES if (FETCH[name] or FetchOptions()).whole_shard_fraction == 1]


def in_domains(name: str, domain_size: int) -> FetchOptions:
    return replace(FETCH[name] or FetchOptions(), domain_size=domain_size)


QUICK = (
    "ragged",
    "fewer blocks than ranks",
    "heads choose differently",
    "three pages a round",
    "kept pages, rounds",
    "rounds without keys",
    "one hot owner",
)


@pytest.mark.parametrize("name", QUICK)
def test_agrees_with_one_rank(name):
    inputs, expected, cfg, lengths, ops = one_rank(name)
    number = QUICK.index(name)
    size, domain_size = GROUPS[number % 3]
    layout = LAYOUTS[number // 3 % 3]
    check(inputs, expected, cfg, lengths, layout, size, ops, in_domains(name, domain_size))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [*GROUPS, (8, 4)], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_agrees_with_one_rank_in_every_layout(name, layout, group):
    inputs, expected, cfg, lengths, ops = one_rank(name)
    check(inputs, expected, cfg, lengths, layout, group[0], ops, in_domains(name, group[1]))


cases = given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 4)),  # G, Hkv
    group=st.sampled_from([*GROUPS, (8, 4), (3, 3)]),
    layout=st.sampled_from(LAYOUTS),
    budget=st.none() | st.integers(1, 12).map(lambda pages: pages * PAGE_BYTES + pages % 2),
    keep_pages=st.booleans(),
    head_groups=st.integers(1, 4),
    seed=st.integers(0, 99),
)


def check_drawn(lengths, heads, group, layout, budget, keep_pages, head_groups, seed):
    per_kv_head, num_kv_heads = heads
    inputs = make_inputs(sum(lengths), per_kv_head * num_kv_heads, num_kv_heads, seed=seed)
    options = FetchOptions(budget, keep_pages=keep_pages, head_groups=head_groups, domain_size=group[1])
    check(inputs, run(inputs, SMALL, lengths), SMALL, lengths, layout, group[0], None, options)


@cases
@settings(max_examples=6, derandomize=True, deadline=None)
def test_drawn_cases_agree_with_one_rank(**case):
    check_drawn(**case)


@pytest.mark.slow
@cases
@settings(max_examples=300, derandomize=True, deadline=None)
def test_many_drawn_cases_agree_with_one_rank(**case):
    check_drawn(**case)


# --- Bits ---------------------------------------------------------------------------------------------------------


def test_forward_and_dq_have_the_bits_of_every_rank_for_itself_and_gradients_repeat():
    """Pages are copies; dk and dv of the selected branch are added in another order, the same in every run."""
    inputs, lengths = make_inputs(300, 4, 2), [300]

    def results(options):
        def work(comm):
            return run(inputs, SMALL, lengths, make_plan("zigzag", lengths, 6, SMALL), comm.rank, comm, fetch=options)

        return run_threads(6, work)

    alone, first, second = (results(FetchOptions(domain_size=size)) for size in (None, 3, 3))
    differ = 0
    for one, a, b in zip(alone, first, second, strict=True):
        assert torch.equal(one[0], a[0])
        assert torch.equal(one[1], a[1])
        assert torch.equal(one[2][0], a[2][0])
        assert all(torch.equal(x, y) for x, y in zip(a[2] + a[3], b[2] + b[3], strict=True))
        differ += not torch.equal(one[2][3], a[2][3])
    assert differ, "in domains sums were taken in the same order as without: was anything passed on?"


# --- Bytes --------------------------------------------------------------------------------------------------------

RULES = (None, "first", "own", "early", "by head", "everything", "nothing")


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_no_more_crosses_than_gathering_sends(rule, group):
    """And each page once for each domain, counted from the blocks that ranks chose; as the formulas say."""
    size, domain_size = group
    cfg = CASES["all choose everything"][0] if rule == "everything" else SMALL
    inputs = make_inputs(260, 4, 2, 12, 8, cfg)
    plan = make_plan("zigzag", [260], size, cfg)
    ops = forced_selection(rule) if rule not in (None, "everything") else None
    options = FetchOptions(domain_size=domain_size)

    def work(comm):
        traffic = Traffic()
        _, ids, *_ = run(inputs, cfg, [260], plan, comm.rank, comm, ops=ops, fetch=options, traffic=traffic)
        return ids, dict(traffic.sent_bytes)

    ids, sent = zip(*run_threads(size, work), strict=True)
    page = plan.block_len * (12 + 8) * 8
    pages = crossing(plan, ids, domain_size)
    assert [x["pages"] for x in sent] == [2 * page * n for n in pages]  # backward fetches again
    gathered = (size // domain_size - 1) * plan.tokens_per_rank // plan.block_len * 2
    assert all(n <= gathered for n in pages)
    assert sum(x["pages.grad"] for x in sent) == sum(pages) * page
    heads = cost.HeadSizes(4, 2, 12, 8, element_bytes=8)
    travels = domain_pages_of(plan, ids, domain_size, num_head_groups=2)
    told = cost.sent_bytes(plan, cfg, heads, travels.between, refetch=True, inside=travels.inside)
    assert [dict(x) for x in sent] == told


# --- Memory -------------------------------------------------------------------------------------------------------


def budgets():
    for domain_size in (2, 3):
        for num_pages in (2, 3, 4, 7, 40):
            quick = (domain_size, num_pages) in ((2, 3), (3, 7))
            yield pytest.param(domain_size, num_pages, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("domain_size", "num_pages"), list(budgets()))
def test_shares_and_pages_held_at_once_fit_in_the_budget(domain_size, num_pages):
    inputs, lengths = make_inputs(480, 2, 2), [480]
    options = FetchOptions(kv_fetch_budget_bytes=num_pages * PAGE_BYTES, domain_size=domain_size)

    def work(comm):
        watched = Watched(board=comm.board, index=comm.index)
        run(inputs, SMALL, lengths, make_plan("zigzag", lengths, 6, SMALL), comm.rank, watched, fetch=options)
        return watched.alive

    held = run_threads(6, work)
    assert all(alive["now"] == 0 for alive in held)
    assert 0 < max(alive["most"] for alive in held) <= num_pages * PAGE_BYTES


def test_shares_differ_by_a_page():
    inputs, plan = make_inputs(300, 4, 4), make_plan("contiguous", [300], 6, SMALL)

    def work(comm):
        traffic = Traffic()
        run(inputs, SMALL, [300], plan, comm.rank, comm, fetch=FetchOptions(domain_size=3), traffic=traffic)
        return traffic.sent_bytes["pages.grad"] // (plan.block_len * 16 * 8)

    shares = run_threads(6, work)
    for domain in (shares[:3], shares[3:]):
        assert max(domain) - min(domain) <= 4  # a page in each of the four head groups
    assert sum(shares[3:]) > 8


# --- Refused --------------------------------------------------------------------------------------------------------


def test_domains_must_divide_the_group():
    def work(comm):
        inputs, plan = make_inputs(64), make_plan("zigzag", [64], 6, SMALL)
        with pytest.raises(ValueError, match=r"domain_size=4 must divide the 6 context-parallel ranks.*\[1, 2, 3, 6\]"):
            run(inputs, SMALL, [64], plan, comm.rank, comm, fetch=FetchOptions(domain_size=4))
        return True

    assert all(run_threads(6, work))


@pytest.mark.parametrize(
    ("others", "remedy"),
    [
        ({"domain_size": 0}, "must be at least 1"),
        ({"domain_size": 2, "transport": "one_sided"}, "leave one of them out"),
        ({"domain_size": 2, "whole_shard_fraction": 0.5}, "link_gb_per_s sets it, too"),
    ],
)
def test_what_cannot_go_together_is_refused(others, remedy):
    with pytest.raises(ValueError, match=remedy):
        FetchOptions(**others)


def test_ranks_that_read_memory_have_no_domains():
    def work(comm):
        inputs, plan = make_inputs(64), make_plan("zigzag", [64], 4, SMALL)
        with pytest.raises(ValueError, match="leave domain_size out"):
            run(inputs, SMALL, [64], plan, comm.rank, comm, fetch=FetchOptions(domain_size=2))
        return True

    assert all(run_readers(4, work))


@pytest.mark.parametrize("domain_size", [1, 3])
def test_one_domain_of_all_and_each_for_itself_are_the_plain_way(domain_size):
    options = FetchOptions(domain_size=domain_size)
    assert options.domain_of(3) == 1
    inputs, lengths = make_inputs(90), [90]

    def work(comm):
        traffic = Traffic()
        plan = make_plan("zigzag", lengths, 3, SMALL)
        run(inputs, SMALL, lengths, plan, comm.rank, comm, fetch=options, traffic=traffic)
        return "pages.inside" in traffic.sent_bytes

    assert not any(run_threads(3, work))
