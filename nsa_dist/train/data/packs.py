"""The rows of a micro-batch as one pack of documents that do not see each other: how it is cut over ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nsa_dist.cp.plan import ShardPlan
from nsa_dist.mcore import NSATransformerConfig, prepare_pack
from nsa_dist.mcore.plans import Place, RankPlan, plan_pack
from nsa_dist.train.world import World

KEPT = 2  # packs: rows that are one document each have the same bounds again and again, others hardly ever


@dataclass(frozen=True)
class Pack:
    """Documents one behind the other, as the layers are told of them and as their row is cut over ranks."""

    bounds: tuple[int, ...]  # [num_docs + 1], padding not counted
    cut: ShardPlan | None  # None: the row is whole on its only rank
    params: PackedSeqParams
    rank_plan: RankPlan  # of the layers; on the host until `Packer.of` gives it out

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
    _ready: dict[tuple[int, ...], Pack] = field(default_factory=dict, init=False, repr=False)  # the oldest first

    def of(self, bounds: tuple[int, ...], planned: Pack | None = None) -> Pack:
        """By the bounds of its documents; made of what was `planned` for it, unless it is kept."""
        pack = self._ready.pop(bounds, None) or self._made_ready(planned or self.plan(bounds))
        self._ready[bounds] = pack
        if len(self._ready) > KEPT:
            self._ready.pop(next(iter(self._ready)))
        return pack

    def plan(self, bounds: tuple[int, ...]) -> Pack:
        """The host's part of a pack; for `of`, which takes it once."""
        cut = self.cut(bounds)
        padded = cut.stream_starts if cut is not None and cut.deals_documents else None
        params = _params(bounds, padded)
        place = Place(self.world.cp.size, self.world.cp.rank, self.world.device)
        return Pack(bounds, cut, params, plan_pack(params, self.megatron, place, padded or bounds))

    def _made_ready(self, pack: Pack) -> Pack:
        """With its plan on the device, and the other ranks asked about it."""
        plan = prepare_pack(pack.params, self.megatron, device=self.world.device, planned=pack.rank_plan)
        return replace(pack, rank_plan=plan)

    def cut(self, bounds: tuple[int, ...]) -> ShardPlan | None:
        """How their row is cut over ranks; None: it is whole on its only rank."""
        if self.world.cp.size == 1:
            return None
        return self._cuts(bounds if self._deals_documents else (0, bounds[-1]))

    @property
    def _deals_documents(self) -> bool:
        return self.megatron.nsa_layout == "zigzag" and self.megatron.nsa_pack_order == "documents"

    @cached_property
    def _cuts(self) -> Callable[[tuple[int, ...]], ShardPlan]:
        return lru_cache(maxsize=KEPT)(self._cut)

    def _cut(self, bounds: tuple[int, ...]) -> ShardPlan:
        size, config = self.world.cp.size, self.megatron
        if self._deals_documents:
            return ShardPlan.zigzag_documents(bounds, size, config.nsa.slc_block_len)
        if config.nsa_layout == "contiguous":
            return ShardPlan.contiguous(bounds, size, bounds[-1] // size)
        return ShardPlan.zigzag(bounds, size, bounds[-1] // (2 * size))


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
