"""Tokens between the order in which a batch was cut and the ranks that a plan wants them on.

Megatron cuts a row of tokens where it likes; a plan cuts it between selection blocks, which start anew with each
document. So near the cuts some tokens stand on another rank than their block.

    row             d0 d0 d0 d0 d0 d0 | d1 d1 d1 d1 d1 d1 d1 d1 d1 d1      6 and 10 tokens, blocks of 4, two ranks
    cut by Megatron [0 1 2 3] rank 0, [4 5 6 7] [8 9 10 11] rank 1, [12 13 14 15] rank 0
    plan            [0 1 2 3] . . | [4 5 . .] [6 7 8 9] ...                d1's blocks begin at token 6
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.device import put_on
from nsa_dist.cp.plan import ShardPlan, runs


@dataclass(frozen=True)
class Deal:
    """Which rows one rank sends and gets. `to_plan` and `from_plan` undo each other but for the plan's padding."""

    num_rows: int  # of the plan on this rank, padding counted
    given_rows: Tensor  # int64 [T given]: by the rank that the plan wants them on
    given_sizes: tuple[int, ...]
    plan_rows: Tensor  # int64 [tokens of the plan on this rank]: by the rank that they were given to
    plan_sizes: tuple[int, ...]

    def to_plan(self, x: Tensor, comm: Comm) -> Tensor:
        """x [T given, ...] -> [num_rows, ...], padding zero. An all-to-all, in backward as well."""
        return _Travel.apply(
            x, comm, (self.given_rows, self.given_sizes), (self.plan_rows, self.plan_sizes), self.num_rows
        )

    def from_plan(self, x: Tensor, comm: Comm) -> Tensor:
        """x [num_rows, ...] -> [T given, ...]. An all-to-all, in backward as well."""
        back = (self.plan_rows, self.plan_sizes), (self.given_rows, self.given_sizes)
        return _Travel.apply(x, comm, *back, len(self.given_rows))

    def on(self, device: torch.device) -> "Deal":
        """With its rows on `device`, where `x` is."""
        return replace(self, given_rows=put_on(device, self.given_rows), plan_rows=put_on(device, self.plan_rows))


def deal(given: ShardPlan, plan: ShardPlan, rank: int) -> Deal:
    """From the ranks of `given` to those of `plan`, of the same tokens in the same packed order. On the CPU."""
    start = torch.cat([_seams(given), _seams(plan)]).unique()  # of runs of tokens that are together in both
    start, length = start[:-1], start.diff()
    (from_rank, from_row), (to_rank, to_row) = given.holder(start), plan.holder(start)

    def rows(own: Tensor, row: Tensor, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        # Rows ascend with their positions in both, so what a rank gets of another comes in the order of its own rows.
        of = (own == rank).nonzero().squeeze(1)
        of = of[other[of].argsort(stable=True)]
        sizes = torch.zeros(plan.cp_size, dtype=torch.int64).index_add_(0, other[of], length[of])
        return runs(row[of], length[of]), tuple(sizes.tolist())

    return Deal(plan.tokens_per_rank, *rows(from_rank, from_row, to_rank), *rows(to_rank, to_row, from_rank))


def _seams(plan: ShardPlan) -> Tensor:
    """Positions in the packed sequence where documents or ranks' segments begin, and its end; in no order, some twice.

    Tokens between two of them are neighbours on one rank.
    """
    document, offset = plan.locate(plan.all_segments[1])
    bounds, is_token = torch.tensor(plan.cu_seqlens), document >= 0
    return torch.cat([bounds, bounds[document[is_token]] + offset[is_token]])


class _Travel(torch.autograd.Function):
    """Rows `taken` of x go to other ranks and come to rows `put` of the result; rows that none comes to are zero.

    forward     y[put]  = all_to_all(x[taken])
    backward    dx[taken] = all_to_all(dy[put])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, taken: tuple, put: tuple, num_rows: int) -> Tensor:
        ctx.route = comm, put, taken, x.shape[0]
        return _travel(x, comm, taken, put, num_rows, "tokens")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        comm, taken, put, num_rows = ctx.route
        return _travel(grads[0], comm, taken, put, num_rows, "tokens.grad"), None, None, None, None


def _travel(x: Tensor, comm: Comm, taken: tuple, put: tuple, num_rows: int, kind: str) -> Tensor:
    (take_rows, send_sizes), (put_rows, recv_sizes) = taken, put
    got = comm.all_to_all(x.index_select(0, take_rows), send_sizes, recv_sizes, kind)
    return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, put_rows, got)
