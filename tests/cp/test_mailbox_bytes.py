"""The formula of what mailboxes hold, against mailboxes."""

from dataclasses import replace

import pytest

from cases import SMALL, make_inputs, run
from cp_cases import make_plan
from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.formulas.mailboxes import mailbox_bytes
from nsa_dist.cp.options import FetchOptions
from thread_mailboxes import run_readers

SPARE_BYTES = 1024 + 2 * 3 * 256  # of a box: its flags, what slots and parts of them are aligned to, a header


@pytest.mark.parametrize(("in_line", "groups"), [pytest.param(True, 1, marks=pytest.mark.slow), (False, 2)])
def test_boxes_hold_what_the_formula_says(in_line, groups):
    lengths, heads = [250], HeadSizes(4, 2, 12, 8, element_bytes=8)
    inputs, plan = make_inputs(250, 4, 2, 12, 8), make_plan("zigzag", lengths, 2, SMALL)

    def work(comm):
        comm = replace(comm, most_in_line=10**9 if in_line else 0)
        run(inputs, SMALL, lengths, plan, comm.rank, comm, fetch=FetchOptions(head_groups=groups))
        return comm.boxes.num_bytes

    told = mailbox_bytes(plan, SMALL, heads, groups)
    for held in run_readers(2, work):
        assert 0 <= held - sum(told.values()) <= len(told) * SPARE_BYTES


def test_a_million_tokens_over_eight_ranks():
    """As docs/decisions/one-sided.md says: 0.9 GiB, most of it keys, values and gradients of pages."""
    told = mailbox_bytes(ShardPlan.zigzag([0, 2**20], 8), NSAConfig(), HeadSizes(64, 4, 128, 128), 4)
    assert sum(told.values()) / 2**30 == pytest.approx(0.9, abs=0.05)
    assert told["pages"] == 2 * 2**17 * 4 * 256 * 2
    assert told["pages.grad"] == pytest.approx(2 * 2**27, rel=0.01)
    assert mailbox_bytes(ShardPlan.zigzag([0, 2**20], 1), NSAConfig(), HeadSizes(64, 4, 128, 128), 4) == {}
