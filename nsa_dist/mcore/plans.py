"""Which plan a batch's tokens follow, worked out once and shared by all layers."""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nsa_dist.cp.plan import ShardPlan


@dataclass(frozen=True)
class RankPlan:
    """A plan as one rank sees it, with what every layer needs of it on the device."""

    plan: ShardPlan
    rank: int
    document_position: Tensor  # int64 [plan.tokens_per_rank]


@dataclass
class PlanCache:
    """Finds the plan of a batch from what Megatron hands to an attention layer. One instance serves all layers."""

    layout: str
    block_len: int
    _by_length: dict[tuple, RankPlan] = field(default_factory=dict, repr=False)
    _last_packed: tuple[PackedSeqParams, RankPlan] | None = field(default=None, repr=False)

    def of_sequence(self, local_tokens: int, cp_size: int, rank: int, device: torch.device) -> RankPlan:
        """One document over the whole length. ValueError if the local tokens cannot be this rank's share of it."""
        key = (local_tokens, cp_size, rank, device)
        if key not in self._by_length:
            plan = self._plan([0, local_tokens * cp_size], cp_size)
            if cp_size > 1 and plan.tokens_per_rank != local_tokens:
                chunks = cp_size * plan.chunks_per_rank
                raise ValueError(
                    f"a sequence of {plan.num_tokens} tokens must be a multiple of {chunks} chunks * slc_block_len = "
                    f"{chunks} * {self.block_len} = {chunks * self.block_len} in the {self.layout} layout over "
                    f"{cp_size} context-parallel ranks, so that no selection block spans two chunks; "
                    f"pad the batch to {plan.tokens_per_rank * cp_size} tokens"
                )
            self._by_length[key] = _on_device(plan, rank, device)
        return self._by_length[key]

    def of_packed(
        self, packed: PackedSeqParams, local_tokens: int, cp_size: int, rank: int, device: torch.device
    ) -> RankPlan:
        """The documents of a pack: in Megatron's order each a zigzag of its own. ValueError as `of_sequence`."""
        if self._last_packed is None or self._last_packed[0] is not packed:
            self._last_packed = (packed, _on_device(self._plan_of_pack(packed, local_tokens, cp_size), rank, device))
        return self._last_packed[1]

    def _plan_of_pack(self, packed: PackedSeqParams, local_tokens: int, cp_size: int) -> ShardPlan:
        bounds = _document_bounds(packed)
        if bounds[-1] != local_tokens * cp_size:
            raise ValueError(
                f"packed_seq_params ends at token {bounds[-1]}, but the batch has {local_tokens} tokens on each of "
                f"{cp_size} context-parallel ranks, so some would belong to no document; pass cu_seqlens_q that ends "
                f"at {local_tokens * cp_size}"
            )
        if cp_size == 1 or self.layout == "contiguous":
            plan = ShardPlan.contiguous(bounds, cp_size, self.block_len)
        else:
            plan = ShardPlan.zigzag_documents(bounds, cp_size, self.block_len)
        if cp_size > 1 and plan.tokens_per_rank != local_tokens:
            whole = 2 * cp_size * self.block_len
            raise ValueError(
                f"the documents of a pack must each be a multiple of 2 * context_parallel_size * slc_block_len = "
                f"2 * {cp_size} * {self.block_len} = {whole} tokens, so that no selection block spans two ranks; "
                f"pad each document to a multiple of {whole}"
            )
        return plan

    def _plan(self, cu_seqlens: list[int], cp_size: int) -> ShardPlan:
        make = ShardPlan.zigzag if self.layout == "zigzag" else ShardPlan.contiguous
        return make(cu_seqlens, cp_size, self.block_len)


def _document_bounds(packed: PackedSeqParams) -> list[int]:
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    return (padded if padded is not None else packed.cu_seqlens_q).tolist()


def _on_device(plan: ShardPlan, rank: int, device: torch.device) -> RankPlan:
    return RankPlan(plan, rank, plan.document_positions(rank).to(device))
