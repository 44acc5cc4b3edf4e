"""The rows of a micro-batch as one pack of documents that do not see each other: how it is cut over ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nsa_dist.cp.plan import ShardPlan
from nsa_dist.mcore import NSATransformerConfig, prepare_pack
from nsa_dist.mcore.plans import RankPlan
from nsa_dist.train.world import World

_KEPT = 2  # packs: rows that are one document each have the same bounds again and again, others hardly ever


@dataclass(frozen=True)
class Pack:
    """Documents one behind the other, as the layers are told of them and as their row is cut over ranks."""

    bounds: tuple[int, ...]  # [num_docs + 1], padding not counted
    cut: ShardPlan | None  # None: the row is whole on its only rank
    params: PackedSeqParams
    rank_plan: RankPlan  # of the layers

    def shard(self, row: Tensor, rank: int) -> Tensor:
        """This rank's [T, ...] of a row [N, ...]; what is padded is zero."""
        return row if self.cut is None else self.cut.shard(row, rank)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """Every rank's [T, ...] -> [N, ...]."""
        return shards[0] if self.cut is None else self.cut.unshard(shards)


@dataclass
class Packer:
    """Makes the packs of a run, the same ones on every context-parallel rank in the same order.

    The newest are kept with their plans: a rank finds one again exactly when all ranks of its group do, so none stands
    alone where they ask each other whether they mean the same.
    """

    megatron: NSATransformerConfig
    world: World
    of: Callable[[tuple[int, ...]], Pack] = field(init=False, repr=False)  # by the bounds of the documents

    def __post_init__(self) -> None:
        self.of = lru_cache(maxsize=_KEPT)(self._make)

    def _make(self, bounds: tuple[int, ...]) -> Pack:
        cut = self._cut(bounds)
        padded = cut.stream_starts if cut is not None and cut.deals_documents else None
        params = _params(bounds, padded)
        rank_plan = prepare_pack(params, self.megatron, device=self.world.device, cu_seqlens=padded or bounds)
        return Pack(bounds, cut, params, rank_plan)

    def _cut(self, bounds: tuple[int, ...]) -> ShardPlan | None:
        size, config = self.world.cp.size, self.megatron
        if size == 1:
            return None
        if config.nsa_layout == "contiguous":
            return ShardPlan.contiguous([0, bounds[-1]], size, bounds[-1] // size)
        if config.nsa_pack_order == "documents":
            return ShardPlan.zigzag_documents(bounds, size, config.nsa.slc_block_len)
        return ShardPlan.zigzag([0, bounds[-1]], size, bounds[-1] // (2 * size))


def joined(bounds: Sequence[Tensor]) -> tuple[int, ...]:
    """The bounds of rows one behind the other: each [num_docs + 1], from 0 on."""
    found = [0]
    for row in bounds:
        first = found[-1]
        found += [first + end for end in row[1:].tolist()]
    return tuple(found)


def _params(bounds: Sequence[int], padded: Sequence[int] | None) -> PackedSeqParams:
    """On the host, where the layers read them: nobody waits for a device."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    if padded is not None:
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = torch.tensor(padded, dtype=torch.int32)
    return params
