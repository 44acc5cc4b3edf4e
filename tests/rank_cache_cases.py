"""A cache over ranks: the drawn cases of one rank, played by every rank at once, and teacher forcing over processes."""

import random
from typing import get_args

import torch.distributed as dist
from torch import Tensor

from cases import SMALL
from inference_cases import Case, Play
from nsa_dist import BranchKV, ShardPlan
from nsa_dist.cp.comm import Comm
from nsa_dist.inference import NSACache, nsa_decode, nsa_prefill
from nsa_dist.inference.pool import CmpPlacement
from ranks import groups_up_to

PLACEMENTS = get_args(CmpPlacement)
LAYOUTS = (ShardPlan.zigzag, ShardPlan.contiguous, ShardPlan.zigzag_documents)


def shard(rows: tuple[Tensor, BranchKV, Tensor], plan: ShardPlan, rank: int) -> tuple[Tensor, BranchKV, Tensor]:
    q, *kv, gates = (plan.shard(x, rank) for x in (rows[0], *rows[1], rows[2]))
    return q, BranchKV(*kv), gates


def prefilled(
    rows: tuple[Tensor, BranchKV, Tensor], cache: NSACache, seqs: list[int], plan: ShardPlan, comm: Comm, **options
) -> tuple[Tensor, Tensor]:
    """out and block_indices of the whole chunks, from every rank's shard."""
    parts = nsa_prefill(
        *shard(rows, plan, comm.rank), cache, seqs, plan=plan, cp_group=comm, return_block_indices=True, **options
    )
    out, blocks = (plan.unshard(list(comm.all_gather(x, "test"))) for x in parts)
    return out, blocks


class RankPlay(Play):
    """One rank's part of a drawn case; the draws are the same on all."""

    def __init__(self, comm: Comm, seed: int, most: int, steps: int, placement: str = "sharded") -> None:
        self.options = {"cmp_placement": placement}
        super().__init__(seed, most, steps)
        self.comm, self.layouts = comm, random.Random(seed)

    def prefilled(self, rows, seqs, bounds):
        if not bounds[-1]:  # a plan has tokens
            return super().prefilled(rows, seqs, bounds) if self.comm.size == 1 else ([], [])
        layout = self.layouts.choice(LAYOUTS)
        return prefilled(rows, self.cache, seqs, layout(bounds, self.comm.size, self.case.cfg.slc_block_len), self.comm)

    def decoded(self, batch, seqs):
        out, blocks = nsa_decode(
            *batch, self.cache, seqs, cp_group=self.comm, return_block_indices=True, ops=self.decode_ops
        )
        everywhere = self.comm.all_gather(out, "test")
        assert (everywhere == everywhere[0]).all()
        return out, blocks


def over_processes(rank: int, world_size: int) -> dict[tuple[int, str], list[tuple[Tensor, Tensor]]]:
    """For each number of ranks and placement what prefill of 40 tokens and 30 steps behind it answer."""
    found = {}
    for size, group in groups_up_to(world_size).items():
        for placement in PLACEMENTS if rank < size else ():
            found[size, placement] = _teacher_forced(group, placement)
    return found


def _teacher_forced(group: dist.ProcessGroup, placement: str) -> list[tuple[Tensor, Tensor]]:
    case, comm = Case.of(70, SMALL, "mlp", False, seed=3), Comm(group)
    cache = case.cache(6, cmp_placement=placement)
    seq = cache.new_sequence()
    plan = ShardPlan.zigzag([0, 40], comm.size, SMALL.slc_block_len)
    steps = [prefilled(case.rows(range(40)), cache, [seq], plan, comm)]
    for token in range(40, 70):
        step = nsa_decode(*case.batch([[token]]), cache, [seq], cp_group=group, return_block_indices=True)
        steps.append((step[0][0], step[1][0]))
    return [(out.detach(), blocks) for out, blocks in steps]
