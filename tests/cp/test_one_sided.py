"""Ranks that read each other's memory, in fp64 against one rank, to 1e-10: the cases of test_cases.py.

Mailboxes lie in the memory of one process, full of NaN where nobody put anything, and their kernels run in triton's
interpreter. On GPUs: test_one_sided_gpu.py.
"""

from dataclasses import replace

import pytest

from cases import run
from cp.test_cases import one_rank
from cp_cases import CASES, FETCH, LAYOUTS, compare, make_plan
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


@pytest.mark.parametrize("in_line", [True, False], ids=["in line", "overlapped"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_rank(name, in_line):
    inputs, expected, cfg, lengths, ops = one_rank(name)
    number = list(CASES).index(name)
    check(inputs, expected, cfg, lengths, LAYOUTS[number % 3], (2, 3, 4)[number // 3 % 3], ops, FETCH[name], in_line)
