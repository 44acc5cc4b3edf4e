"""Context parallelism in fp64 against one rank, to 1e-10: every case, layout and number of ranks; then drawn ones.

Ranks are threads here (thread_ranks.py), so that eight of them cost what their work costs. test_ranks.py runs a few of
the cases over real processes.
"""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import SMALL, make_inputs, run
from cp_cases import CASES, FETCH, LAYOUTS, compare, forced_selection, make_plan
from nsa_dist.cp.options import FetchOptions
from thread_ranks import run_threads

SIZES = (1, 2, 3, 4, 5, 8)


def check(inputs, expected, cfg, lengths, layout, size, ops, options) -> None:
    """Every rank against its shard of one rank's results; gradients of phi's parameters are summed over ranks."""

    def work(comm):
        plan = make_plan(layout, lengths, size, cfg)
        return plan, run(inputs, cfg, lengths, plan, comm.rank, comm, ops=ops, fetch=options)

    results = run_threads(size, work)
    of_phi = [sum(parts) for parts in zip(*(got[3] for _, got in results), strict=True)]
    for rank, (plan, got) in enumerate(results):
        compare((*got[:3], of_phi), expected, plan, rank)


@cache
def one_rank(name: str):
    cfg, lengths, num_q_heads, num_kv_heads, dim_k, dim_v, rule = CASES[name]
    inputs = make_inputs(sum(lengths), num_q_heads, num_kv_heads, dim_k, dim_v, cfg)
    ops = forced_selection(rule) if rule else None
    return inputs, run(inputs, cfg, lengths, ops=ops), cfg, lengths, ops


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_rank(name, layout, size):
    inputs, expected, cfg, lengths, ops = one_rank(name)
    check(inputs, expected, cfg, lengths, layout, size, ops, FETCH[name])


PAGE_BYTES = SMALL.slc_block_len * (8 + 8) * 8
fetch_options = st.builds(
    FetchOptions,
    kv_fetch_budget_bytes=st.none() | st.integers(1, 12).map(lambda pages: pages * PAGE_BYTES + pages % 2),
    whole_shard_fraction=st.sampled_from([1.0, 0.6, 0.2]),
    keep_pages=st.booleans(),
    head_groups=st.integers(1, 4),
)


cases = given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 4)),  # G, Hkv
    size=st.sampled_from([2, 3, 5, 8]),
    layout=st.sampled_from((*LAYOUTS, "contiguous_documents")),
    options=fetch_options,
    seed=st.integers(0, 99),
)


def check_drawn(lengths, heads, size, layout, options, seed):
    group, num_kv_heads = heads
    inputs = make_inputs(sum(lengths), group * num_kv_heads, num_kv_heads, seed=seed)
    check(inputs, run(inputs, SMALL, lengths), SMALL, lengths, layout, size, None, options)


@cases
@settings(max_examples=25, derandomize=True, deadline=None)
def test_drawn_cases_agree_with_one_rank(**case):
    check_drawn(**case)


@pytest.mark.slow
@cases
@settings(max_examples=400, derandomize=True, deadline=None)
def test_many_drawn_cases_agree_with_one_rank(**case):
    check_drawn(**case)
