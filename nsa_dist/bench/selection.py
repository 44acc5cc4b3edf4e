"""A choice of blocks that reaches a given union: what trained models choose is not known, so it is set.

Every query keeps its forced blocks and draws the others, distinct, evenly over all allowed ones that it sees; allowed
are the blocks of its rank and remote blocks drawn beforehand: the fraction u of them.

    blocks 0 .. 7, own 2 3 4 5, u = 0.5: allowed of the remote 0 1 6 7 are two that some query sees, here 0 and 1
    the query in block 5 with n = 4 takes 0, 4, 5, which are forced, and one of 1 2 3
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.plan import ShardPlan


@dataclass(frozen=True)
class Draw:
    """What the queries of one rank choose."""

    block_indices: Tensor  # int32 [T, Hkv, n], ascending, -1 last
    remote: Tensor  # bool [Hkv, num_blocks]: the remote blocks that some query chose
    num_remote: int  # remote blocks there are, seen or not

    @property
    def union_fractions(self) -> list[float]:
        """u reached, of every kv head, counted as `Traffic.union_fractions` counts it."""
        return (self.remote.sum(1) / max(1, self.num_remote)).tolist()


def draw_selection(
    plan: ShardPlan, cfg: NSAConfig, rank: int, num_kv_heads: int, union_fraction: float, device: torch.device
) -> Draw:
    """For a plan over one document. The same on every call; a rank that sees less than u chooses all that it sees."""
    generator = torch.Generator(device).manual_seed(rank)
    local = _local_blocks(plan, rank).to(device)
    allowed = local | draw_remote(plan, cfg, rank, union_fraction).to(device)
    tokens = plan.stream_positions(rank).to(device)
    own = torch.div(tokens, cfg.slc_block_len, rounding_mode="floor")
    block_indices = torch.stack([_draw_for_queries(own, allowed, cfg, generator) for _ in range(num_kv_heads)], 1)
    return Draw(block_indices, _union(block_indices, plan.num_blocks) & ~local, int((~local).sum()))


def draw_remote(plan: ShardPlan, cfg: NSAConfig, rank: int, union_fraction: float) -> Tensor:
    """bool [num_blocks], on the CPU: the remote blocks that the queries of `rank` may choose, for every head the same.

    What is forced, and others drawn evenly up to u of all remote blocks, as far as the rank sees them.
    """
    generator = torch.Generator().manual_seed(rank)
    remote = ~_local_blocks(plan, rank)
    seen, chosen = remote.clone(), torch.zeros_like(remote)
    seen[plan.segments(rank)[-1].stop // plan.block_len :] = False
    chosen[: cfg.num_init_blocks] = True
    for segment in plan.segments(rank):
        first = segment.start // plan.block_len
        chosen[max(0, first - cfg.num_local_blocks + 1) : first] = True
    chosen &= seen
    free = (seen & ~chosen).nonzero().squeeze(1)
    wanted = min(int(seen.sum()), round(union_fraction * int(remote.sum()))) - int(chosen.sum())
    chosen[free[torch.randperm(len(free), generator=generator)[: max(0, wanted)]]] = True
    return chosen


def with_selection(ops: Any, replaced: Callable[[Tensor], Tensor]) -> SimpleNamespace:
    """`ops` whose `select_blocks` does its work, hands the result to `replaced`, and returns what that returns."""

    def select_blocks(*args, **kwargs) -> Tensor:
        return replaced(ops.select_blocks(*args, **kwargs))

    names = (name for name in dir(ops) if not name.startswith("_"))
    return SimpleNamespace(**{name: getattr(ops, name) for name in names} | {"select_blocks": select_blocks})


class Replay:
    """Gives a drawn selection [T, Hkv, n] out in the parts a layer asks for: all heads, some, or half the rows."""

    def __init__(self, block_indices: Tensor) -> None:
        self._ids, self._row, self._head = block_indices, 0, 0

    def __call__(self, chosen: Tensor) -> Tensor:
        rows, heads = chosen.shape[:2]
        part = self._ids[self._row : self._row + rows, self._head : self._head + heads]
        self._row += rows
        if self._row == self._ids.shape[0]:
            self._row, self._head = 0, (self._head + heads) % self._ids.shape[1]
        return part.contiguous()


def _local_blocks(plan: ShardPlan, rank: int) -> Tensor:
    """bool [num_blocks], on the CPU."""
    local = torch.zeros(plan.num_blocks, dtype=torch.bool)
    for segment in plan.segments(rank):
        local[segment.start // plan.block_len : segment.stop // plan.block_len] = True
    return local


def _draw_for_queries(own: Tensor, allowed: Tensor, cfg: NSAConfig, generator: torch.Generator) -> Tensor:
    """int32 [T, n] of one head. Slots between the forced ones take one block of each of as many equal strata."""
    first, last = cfg.num_init_blocks, cfg.num_local_blocks
    free_slots = cfg.num_slc_blocks - first - last
    candidates = allowed.clone()
    candidates[:first] = False
    ids = candidates.nonzero().squeeze(1)
    # Candidates that a query sees and that are not among its forced last ones: the first `seen` of the ascending ids.
    seen = torch.searchsorted(ids, (own - last + 1).clamp(min=0))  # [T]
    slot = torch.arange(free_slots, device=own.device)
    begin, end = (torch.div(seen[:, None] * (slot + i), free_slots, rounding_mode="floor") for i in (0, 1))
    shift = torch.rand(len(own), free_slots, generator=generator, device=own.device) * (end - begin)
    pick = torch.minimum(begin + shift.long(), end - 1)
    few = seen[:, None] <= free_slots
    pick = torch.where(few, slot.expand_as(pick), pick)
    middle = ids[pick.clamp(0, len(ids) - 1)].where(slot < seen[:, None], -1) if len(ids) else torch.full_like(pick, -1)
    start = torch.arange(first, device=own.device).expand(len(own), -1)
    recent = own[:, None] - torch.arange(last - 1, -1, -1, device=own.device)
    recent = recent.where(recent >= first, -1)
    row = torch.cat([start.where(start <= own[:, None], -1), middle, recent], 1)
    return _ascending(row, len(allowed))


def _ascending(row: Tensor, none: int) -> Tensor:
    """Rows sorted, -1 last."""
    row = row.masked_fill(row < 0, none).sort(-1).values
    return row.masked_fill(row == none, -1).to(torch.int32)


def _union(block_indices: Tensor, num_blocks: int) -> Tensor:
    """bool [Hkv, num_blocks]: chosen by any query."""
    marks = torch.zeros(block_indices.shape[1], num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    ids = block_indices.transpose(0, 1).flatten(1).long()
    marks.scatter_(1, ids.masked_fill(ids < 0, num_blocks), True)
    return marks[:, :num_blocks]
