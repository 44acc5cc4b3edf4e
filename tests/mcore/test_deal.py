"""Tokens on their way between Megatron's cut and a plan, each traced to where it came from. Ranks are threads."""

import pytest
import torch

from nsa_dist import ShardPlan
from nsa_dist.mcore.deal import deal
from thread_ranks import run_threads

ROWS = {
    "documents of any length": [0, 7, 8, 31, 60],
    "one document": [0, 120],
    "many short ones": [*range(0, 240, 4)],
    "blocks that divide": [0, 48, 240],
}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("bounds", [*ROWS.values(), [0, 0, 5, 5, 60, 240, 240]], ids=[*ROWS, "empty ones"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_it_is_what_follows_from_every_token(bounds, size, layout):
    tokens = bounds[-1] // (2 * size) * 2 * size
    bounds = [*(b for b in bounds if b < tokens), tokens]
    make = getattr(ShardPlan, layout)
    given = make([0, tokens], size, tokens // (size * (2 if layout == "zigzag" else 1)))
    plan = make(bounds, size, 4)
    for rank in range(size):
        found, wanted = deal(given, plan, rank), plan.positions(rank)
        rows = (wanted >= 0).nonzero().squeeze(1)
        for own_rows, own_sizes, ranks, at in (
            (found.given_rows, found.given_sizes, plan.holder(given.positions(rank))[0], torch.arange(tokens // size)),
            (found.plan_rows, found.plan_sizes, given.holder(wanted[rows])[0], rows),
        ):
            assert torch.equal(own_rows, at[ranks.argsort(stable=True)])
            assert own_sizes == tuple(torch.bincount(ranks, minlength=size).tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("bounds", ROWS.values(), ids=ROWS.keys())
def test_every_token_goes_to_the_rank_of_its_block_and_back(bounds, size):
    tokens = bounds[-1] // (2 * size) * 2 * size
    bounds = [*(b for b in bounds if b < tokens), tokens]
    given = ShardPlan.zigzag([0, tokens], size, tokens // (2 * size))
    plan = ShardPlan.zigzag(bounds, size, 4)
    x = torch.stack([torch.arange(tokens), torch.arange(tokens) + 1000], 1).double() + 1

    def work(comm):
        rank = comm.rank
        here = deal(given, plan, rank)
        mine = given.shard(x, rank).clone().requires_grad_()
        there = here.to_plan(mine, comm)
        back = here.from_plan(there, comm)
        assert torch.equal(there, plan.shard(x, rank))
        assert torch.equal(back, mine)
        weight = plan.shard(2 * x, rank) + 3 * plan.padding(rank)[:, None]  # what reaches padding goes nowhere
        (there * weight).sum().backward(retain_graph=True)
        assert torch.equal(mine.grad, 2 * given.shard(x, rank))
        (back * given.shard(x, rank)).sum().backward()
        assert torch.equal(mine.grad, 3 * given.shard(x, rank))
        assert torch.equal(
            plan.holder(plan.positions(rank).clamp(min=0))[0][~plan.padding(rank)].unique(), torch.tensor([rank])
        )
        return len(there)

    assert run_threads(size, work) == [plan.tokens_per_rank] * size
