"""Ranks that read each other's memory, in fp64 against one rank, to 1e-10: the cases of test_cases.py.

Mailboxes lie in the memory of one process, full of NaN where nobody put anything, and their kernels run in triton's
interpreter. On GPUs: test_one_sided_gpu.py.
"""

from dataclasses import replace

import pytest

from cases import SMALL, make_inputs, run
from cp.test_cases import PAGE_BYTES, one_rank
from cp_cases import CASES, FETCH, LAYOUTS, compare, make_plan
from nsa_dist.cp.options import FetchOptions
from thread_mailboxes import run_readers


def check(inputs, expected, cfg, lengths, layout, size, ops, options, in_line=True) -> None:
    def work(comm):
        comm = replace(comm, most_in_line=10**9 if in_line else 0)
        plan = make_plan(layout, lengths, size, cfg)
        return plan, run(inputs, cfg, lengths, plan, comm.rank, comm, ops=ops, fetch=options)

    results = run_readers(size, work)
    of_phi = [sum(parts) for parts in zip(*(got[3] for _, got in results), strict=True)]
    for rank, (plan, got) in enumerate(results):
        compare((*got[:3], of_phi), expected, plan, rank)


# What meets every step of both schedules, and none for long; triton's interpreter is slow.
QUICK = {
    "fewer blocks than ranks": (True, False),
    "all choose everything": (True,),
    "window over several ranks": (True,),
    "heads choose differently": (False,),
    "one kv head, whole shards": (False,),
}


def listed():
    for name in CASES:
        for in_line in (True, False):
            marks = () if in_line in QUICK.get(name, ()) else pytest.mark.slow
            yield pytest.param(name, in_line, marks=marks, id=f"{name}, {'in line' if in_line else 'overlapped'}")


@pytest.mark.parametrize(("name", "in_line"), list(listed()))
def test_agrees_with_one_rank(name, in_line):
    inputs, expected, cfg, lengths, ops = one_rank(name)
    number = list(CASES).index(name)
    check(inputs, expected, cfg, lengths, LAYOUTS[number % 3], (2, 3, 4)[number // 3 % 3], ops, FETCH[name], in_line)


@pytest.mark.parametrize("in_line", [True, False], ids=["in line", "overlapped"])
def test_ranges_under_a_budget(in_line):
    lengths = [70, 20]
    inputs = make_inputs(sum(lengths), 4, 2)
    options = FetchOptions(kv_fetch_budget_bytes=4 * PAGE_BYTES, keep_pages=not in_line)
    check(inputs, run(inputs, SMALL, lengths), SMALL, lengths, "zigzag", 2, None, options, in_line)
