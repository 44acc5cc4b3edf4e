"""Which plan a batch's tokens follow, worked out once and shared by all layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from nsa_dist.attention import Heads, post_agreement
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.device import on_host, put_on
from nsa_dist.cp.formulas.batches import batch_plan
from nsa_dist.cp.layout import rank_layout
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.mcore.arrivals import Arrivals
from nsa_dist.mcore.config import NSATransformerConfig
from nsa_dist.mcore.deal import Deal, deal
from nsa_dist.mcore.packs import PackReading, document_bounds, pack_order
from nsa_dist.operators import Tiles, ops_for
from nsa_dist.rope import Positions, Turns
from nsa_dist.rope_scaling import Rotary


@dataclass(frozen=True)
class RankPlan:
    """A plan as one rank sees it, with what every layer needs of it on the device."""

    plan: ShardPlan
    rank: int
    document_position: Tensor  # int64 [plan.tokens_per_rank]
    given: ShardPlan  # how the batch was cut: the plan itself, unless there is a deal
    deal: Deal | None = None  # None: every token is where the plan wants it
    samples: int = 1  # of the batch, documents one behind the other; 1 for a pack of documents that came as one
    reading: PackReading | None = field(default=None, repr=False, compare=False)  # of the pack that this is the plan of
    _batches: dict[int, "RankPlan"] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def positions(self) -> Positions:
        """Of this rank's tokens, for all layers."""
        return Positions(self.document_position)

    @cached_property
    def token_positions(self) -> Positions:
        """As `positions` of a plan of one rank, without the padding of its documents."""
        return Positions(self.plan.unshard([self.document_position]))

    @cached_property
    def document_blocks(self) -> "DocumentBlocks":
        """Of this rank's tokens, for who looks at what they chose."""
        plan = self.plan
        blocks = plan.local_blocks(self.rank)
        counts = -(-torch.tensor(plan.cu_seqlens).diff() // plan.block_len)
        first = (counts.cumsum(0) - counts)[blocks.document].repeat_interleave(plan.block_len)
        lengths = self.reading and self.reading.lengths
        doc_len = blocks.doc_len if lengths is None else torch.tensor(lengths)[blocks.document]
        is_token = torch.arange(plan.block_len) < (doc_len - blocks.offset)[:, None]
        own = (blocks.offset // plan.block_len).repeat_interleave(plan.block_len)
        device = self.document_position.device
        return DocumentBlocks(*(put_on(device, x) for x in (is_token.flatten(), first, own)))

    def on(self, device: torch.device) -> "RankPlan":
        """Of one on the host what layers on `device` need, in the order of the current stream; nobody waits."""
        with torch.inference_mode(False):  # kept for batches that train
            deal, position = self.deal and self.deal.on(device), put_on(device, self.document_position)
        return replace(self, document_position=position, deal=deal, _batches={})

    def turns(self, rotary: Rotary, head_dim: int, dtype: torch.dtype) -> Turns:
        return self.positions.turns(rotary, head_dim, dtype)

    @property
    def blocks_of_sample(self) -> int:
        """Selection blocks of one of `samples`, by the ids that callers see."""
        return -(-(self.plan.num_tokens // self.samples) // self.plan.block_len)

    def of_batch(self, samples: int) -> "RankPlan":
        """Of the pack that `samples` rows of this plan's one document are, one behind the other on every rank."""
        if samples == 1:
            return self
        if samples not in self._batches:
            plan = batch_plan(self.plan, samples)
            position = self.document_position.repeat(samples)
            self._batches[samples] = RankPlan(plan, self.rank, position, plan, samples=samples)
        return self._batches[samples]


class DocumentBlocks(NamedTuple):
    """Of every token of a rank, [plan.tokens_per_rank]."""

    is_token: Tensor  # bool: no padding
    first: Tensor  # int64: the id that callers see of the first selection block of its document
    own: Tensor  # int64: its own block, counted from there


@dataclass(frozen=True)
class Place:
    """Where a process stands: its context-parallel group, and the device of its tensors."""

    cp_size: int
    rank: int
    device: torch.device

    @classmethod
    def of(cls, pg_collection: ProcessGroupCollection, device: torch.device) -> "Place":
        return cls(get_pg_size(pg_collection.cp), get_pg_rank(pg_collection.cp), device)


class _PackPlans(dict):
    """Plans of a pack, kept on it: they live and die with it. A copy of the pack works out its own."""

    def __reduce__(self) -> tuple:
        return _PackPlans, ()

    def __deepcopy__(self, memo: dict) -> "_PackPlans":
        return _PackPlans()


@dataclass
class PlanCache:
    """Finds the plan of a batch from what Megatron hands to an attention layer. One instance serves all layers."""

    config: NSATransformerConfig
    arrivals: Arrivals = field(default_factory=Arrivals, repr=False)
    _by_length: dict[tuple, RankPlan] = field(default_factory=dict, repr=False)

    def of_sequence(self, local_tokens: int, place: Place) -> RankPlan:
        """One document over the whole length. ValueError if the local tokens cannot be this rank's share of it."""
        key = (local_tokens, place)
        if key not in self._by_length:
            layout, block_len = self.config.nsa_layout, self.config.nsa.slc_block_len
            make = ShardPlan.zigzag if layout == "zigzag" else ShardPlan.contiguous
            plan = make([0, local_tokens * place.cp_size], place.cp_size, block_len)
            if place.cp_size > 1 and plan.tokens_per_rank != local_tokens:
                chunks = place.cp_size * plan.chunks_per_rank
                raise ValueError(
                    f"a sequence of {plan.num_tokens} tokens must be a multiple of {chunks} chunks * slc_block_len = "
                    f"{chunks} * {block_len} = {chunks * block_len} in the {layout} layout over "
                    f"{place.cp_size} context-parallel ranks, so that no selection block spans two chunks; "
                    f"pad the batch to {plan.tokens_per_rank * place.cp_size} tokens"
                )
            self._by_length[key] = _rank_plan(plan, plan, place).on(place.device)
        return self._by_length[key]

    def of_packed(self, packed: PackedSeqParams, local_tokens: int, place: Place) -> RankPlan:
        """The documents of a pack, cut as `pack_order` says, in the contiguous layout into one chunk a rank.

        Follows what is written to the pack (`PackReading`).

        ValueError if the pack is not one, or its documents end elsewhere than the batch, or, in Megatron's order of
        documents, blocks would span two ranks.
        """
        entries = vars(packed).setdefault("_nsa_plans", _PackPlans())
        key = (self._cut(packed, place), self.config.nsa.slc_block_len, place)
        reading, rank_plan = entries.get(key, (None, None))
        if reading is None or not reading.holds(packed):
            reading, rank_plan = PackReading(packed), None
        if reading.bounds[-1] != local_tokens * place.cp_size:
            raise ValueError(
                f"packed_seq_params ends at token {reading.bounds[-1]}, but the batch has {local_tokens} tokens "
                f"on each of {place.cp_size} context-parallel ranks, so some would belong to no document; pass "
                f"cu_seqlens_q that ends at {local_tokens * place.cp_size}"
            )
        if rank_plan is None:
            rank_plan = self._plan_of_pack(reading, key[0], place).on(place.device)
            entries[key] = reading, rank_plan
        return rank_plan

    def plan(self, packed: PackedSeqParams, claimed: tuple[int, ...] | None, place: Place) -> RankPlan:
        """As `of_packed` for a batch that is not there yet, without its copy on the device."""
        return self._plan_of_pack(PackReading(packed, claimed), self._cut(packed, place), place)

    def note(self, packed: PackedSeqParams, rank_plan: RankPlan, place: Place) -> None:
        """From now on `of_packed` finds this plan on the pack that it was made of."""
        key = (self._cut(packed, place), self.config.nsa.slc_block_len, place)
        vars(packed).setdefault("_nsa_plans", _PackPlans())[key] = rank_plan.reading, rank_plan

    def _cut(self, packed: PackedSeqParams, place: Place) -> str:
        if place.cp_size == 1 or self.config.nsa_layout == "contiguous":
            return "contiguous"
        return pack_order(self.config, packed)

    def _plan_of_pack(self, reading: PackReading, cut: str, place: Place) -> RankPlan:
        bounds, size, block_len = reading.bounds, place.cp_size, self.config.nsa.slc_block_len
        if size == 1:
            plan = ShardPlan.contiguous(bounds, size, block_len)
        elif cut == "documents":
            plan = ShardPlan.zigzag_documents(bounds, size, block_len)
            if plan.tokens_per_rank * size != plan.num_tokens:
                raise ValueError(
                    f"the documents of a pack, bounds {list(bounds[:6])}{'...' if len(bounds) > 6 else ''}, must be "
                    f"whole numbers of selection blocks in every chunk, so that no block spans two ranks; in "
                    f"Megatron's order a document has 2 * context_parallel_size = {2 * size} chunks, so pad each "
                    f"document to a multiple of {2 * size * block_len}"
                )
        else:
            return self._plan_of_row(reading, cut, place)
        return _rank_plan(plan, plan, place, reading)

    def _plan_of_row(self, reading: PackReading, cut: str, place: Place) -> RankPlan:
        """Of a row that is cut into chunks wherever its documents end: tokens move to the rank of their block."""
        make = ShardPlan.contiguous if cut == "contiguous" else ShardPlan.zigzag
        bounds, per_rank = reading.bounds, 1 if cut == "contiguous" else 2
        chunk, rest = divmod(bounds[-1], per_rank * place.cp_size)
        if rest:
            raise ValueError(
                f"packed_seq_params ends at token {bounds[-1]}, which is not a multiple of {per_rank} * "
                f"context_parallel_size = {per_rank * place.cp_size}, the number of chunks that a row is cut into; pad "
                f"the row to {(chunk + 1) * per_rank * place.cp_size} tokens"
            )
        plan = make(bounds, place.cp_size, self.config.nsa.slc_block_len)
        if plan.tokens_per_rank * place.cp_size == plan.num_tokens:  # no padding: chunks are the row's
            return _rank_plan(plan, plan, place, reading)
        return _rank_plan(plan, make([0, bounds[-1]], place.cp_size, chunk), place, reading)


def prepare_pack(
    packed: PackedSeqParams,
    config: NSATransformerConfig,
    *,
    device: torch.device,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    dtype: torch.dtype | None = None,
    planned: RankPlan | None = None,
) -> RankPlan:
    """Works out the plan of a pack ahead of the layers, and asks the other ranks whether theirs is the same.

    Call it where the batch is made, on every context-parallel rank at the same place among the group's collectives,
    on every stage of a pipeline with layers. The first layer then finds tensors on the device and an answer; without
    this call it does the work itself and waits for the ranks. What is written to the pack afterwards is seen.

    device          of the hidden states
    cu_seqlens      the pack's bounds (the padded ones, if it has any) where the host has them; None: bounds on a GPU
                    are waited for. The first layer compares them with the pack's
    pg_collection   with tp and cp, as the layers have it; None: Megatron's own groups
    dtype           of the layers' queries; None: config.params_dtype
    planned         what `mcore.plans.plan_pack` made of this pack, for one call; None: made here

    Returns the plan as this rank has it. ValueError as the layers raise it. What ranks disagree about is raised by the
    first layer.
    """
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    place = Place.of(groups, device)
    if planned is None:
        planned = plan_pack(packed, config, place, cu_seqlens, dtype)
    rank_plan = planned.on(device)
    PlanCache(config).note(packed, rank_plan, place)
    plan = rank_plan.plan
    if place.cp_size > 1:
        heads = local_heads(config, get_pg_size(groups.tp), dtype or config.params_dtype)
        post_agreement(plan, config.nsa, heads, config.nsa_fetch, Comm(groups.cp))
    _derive(plan, config, place, device, dtype)
    return rank_plan


def plan_pack(
    packed: PackedSeqParams,
    config: NSATransformerConfig,
    place: Place,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> RankPlan:
    """The host's part of `prepare_pack`, which takes it as `planned`: it asks no rank and starts nothing on a device.

    So it may be made ahead in another thread, where the pack's bounds are on the CPU. `place` is that of the layers.
    """
    claimed = None if cu_seqlens is None else document_bounds(cu_seqlens)
    rank_plan = PlanCache(config).plan(packed, claimed, place)
    _derive(rank_plan.plan, config, place, torch.device("cpu"), dtype)
    return rank_plan


def _derive(
    plan: ShardPlan, config: NSATransformerConfig, place: Place, device: torch.device, dtype: torch.dtype | None
) -> None:
    """What layers at `place` will ask of the plan, kept with it on `device`, which is theirs or the CPU."""
    ops = ops_for(place.device, dtype or config.params_dtype)
    group = config.num_attention_heads // config.num_query_groups
    alignment = Tiles.of(ops, group, config.nsa, plan.num_documents).key_alignment
    rank_layout(plan, config.nsa, place.rank, device, alignment)
    plan.prepare(place.rank, device)


def local_heads(config: NSATransformerConfig, tp_size: int, dtype: torch.dtype) -> Heads:
    """Those that one tensor-parallel rank hands to `nsa_attention`."""
    num_heads = config.num_attention_heads // tp_size, config.num_query_groups // tp_size
    return Heads(*num_heads, config.kv_channels, config.v_head_dim, dtype)


def _rank_plan(plan: ShardPlan, given: ShardPlan, place: Place, reading: PackReading | None = None) -> RankPlan:
    with on_host():  # kept for batches that train
        dealt = None if given is plan else deal(given, plan, place.rank)
        return RankPlan(plan, place.rank, plan.document_positions(place.rank), given, dealt, reading=reading)
