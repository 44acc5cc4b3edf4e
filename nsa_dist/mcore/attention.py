"""Native Sparse Attention as the self-attention of a Megatron-core transformer layer, and what a dense one shares."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import Attention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.utils import get_pg_size
from torch import Tensor, nn

from nsa_dist.attention import check_agreement
from nsa_dist.cp.comm import Comm
from nsa_dist.mcore.config import NSATransformerConfig, need_nsa_config
from nsa_dist.mcore.core import NSACoreAttention
from nsa_dist.mcore.inference.dynamic import check_dynamic
from nsa_dist.mcore.inference.static import check_context
from nsa_dist.mcore.norm import NormedKeys, norm_of_heads
from nsa_dist.mcore.plans import Place, PlanCache, RankPlan, local_heads


@dataclass
class NSASelfAttentionSubmodules:
    """The two linear layers; local or Transformer Engine ones."""

    linear_qkv: ModuleSpec | type
    linear_proj: ModuleSpec | type


class PlannedSelfAttention(Attention):
    """Self-attention that turns its own queries and keys, at the positions of a plan. Subclasses say what is projected.

    One column-parallel `linear_qkv` projects everything, interleaved by key/value head so that a tensor-parallel cut
    takes whole heads; `group_widths` are the columns of one such head.

    Tokens of a sequence are those that `config.nsa_layout` gives to this context-parallel rank, those of a pack as
    `packs.pack_order` says; the layer derives their positions itself. An `attention_mask` must be causal, a
    `rotary_pos_emb` that of the layer's own base (`arrivals.py`): neither is read for anything else.

    An `inference_context` has the keys and values so far, and `hidden_states` are the tokens behind them: of all rows
    equally many if it is a static one (`inference/static.py`), of each request its own (`inference/dynamic.py`).

    `has_positions` gives it some whatever `no_rope_freq` says of its number.

    Raises ValueError for what the layer does not do: attention biases, cross attention, CUDA graphs of a context; for
    lengths that would let a selection block span two context-parallel ranks.
    """

    def __init__(
        self,
        config: NSATransformerConfig,
        submodules: NSASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        plans: PlanCache | None = None,
        has_positions: bool = False,
        **later_versions: Any,
    ) -> None:
        need_nsa_config(config, type(self).__name__)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(
                f"attn_mask_type={attn_mask_type} is not causal, but {type(self).__name__} looks at the past only; "
                f"set attn_mask_type=AttnMaskType.causal"
            )
        super().__init__(
            config=config,
            submodules=SelfAttentionSubmodules(linear_qkv=_NotBuilt, core_attention=_NotBuilt, linear_proj=_NotBuilt),
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            **later_versions,
        )
        self.plans = plans or PlanCache(config)
        self.rotary = config.rotary if has_positions else config.rotary_of(layer_number)
        self.core_attention = self._build_core()
        self._build_projections(submodules)
        self._build_norms()

    @property
    @abstractmethod
    def branches(self) -> tuple[str, ...]:
        """The pairs of keys and values that `linear_qkv` projects, by name."""

    @property
    @abstractmethod
    def group_widths(self) -> list[int]:
        """Columns of `linear_qkv` for one key/value head, by part."""

    @abstractmethod
    def _build_core(self) -> nn.Module:
        """From the tensors of `_split` and a `RankPlan` to [s, b, Hq * Dv]."""

    @abstractmethod
    def _split(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """[s, b, columns of `linear_qkv`] -> what the core takes."""

    def _append(self, mixed: Tensor, context: Any) -> Tensor:
        """[s, b, columns of `linear_qkv`] of new tokens -> [s, b, Hq * Dv], by the cache of a context."""
        raise ValueError(
            f"{type(self).__name__} was given a {type(context).__name__}, and it keeps no cache: it is the twin that "
            f"NSA is compared with; leave the context out, and give whole sequences"
        )

    @property
    def comm(self) -> Comm:
        """The context-parallel group."""
        return Comm(self.pg_collection.cp)

    def _draw_qkv(self, weight: Tensor) -> Tensor:
        """Initial values of `linear_qkv`, of the whole model or of one tensor-parallel rank."""
        return self.config.init_method(weight)

    def _build_projections(self, submodules: NSASelfAttentionSubmodules) -> None:
        config = self.config
        common = {"config": config, "is_expert": False, "tp_group": self.pg_collection.tp}
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            config.num_query_groups * sum(self.group_widths),
            init_method=self._draw_qkv,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            config.num_attention_heads * config.v_head_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **common,
        )

    def _build_norms(self) -> None:
        """Under the names by which Megatron sums their gradients over tensor-parallel ranks, which have other heads."""
        config, norm = self.config, norm_of_heads(self.config)
        self.q_layernorm: nn.Module = nn.Identity()
        self.k_layernorm: nn.Module = nn.Identity()
        if norm is not None:
            make = partial(norm, config, config.kv_channels, config.layernorm_epsilon)
            self.q_layernorm = make()
            self.k_layernorm = NormedKeys(self.branches, make, (config.kv_channels, config.v_head_dim))

    def _normed(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """q [s, b, Hkv, G * Dk] as [s, b, Hq, Dk], kv [s, b, Hkv, pairs * (Dk + Dv)], both with their norms."""
        return self.q_layernorm(q.unflatten(-1, (-1, self.config.kv_channels)).flatten(2, 3)), self.k_layernorm(kv)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **later_versions: Any
    ) -> tuple[Tensor, ...]:
        """[s, b, h] -> what the core takes, of this rank's heads."""
        return self._split(self.linear_qkv(hidden_states)[0])

    def _parts(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """[s, b, ...] -> [s, b, local key/value heads, width] for each of `group_widths`."""
        mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, sum(self.group_widths)))
        return mixed.split(self.group_widths, -1)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
        **later_versions: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> (output [s, b, h], bias or None), s = the tokens of this rank."""
        _refuse(
            type(self).__name__,
            key_value_states=key_value_states,
            attention_bias=attention_bias,
            sequence_len_offset=sequence_len_offset,
            rotary_pos_cos=rotary_pos_cos,
            rotary_pos_sin=rotary_pos_sin,
            rotary_pos_cos_sin=rotary_pos_cos_sin,
            **later_versions,
        )
        mixed, _ = self.linear_qkv(hidden_states)
        context = inference_params if inference_context is None else inference_context  # the older name
        if context is not None:
            _refuse(type(self).__name__, packed_seq_params=packed_seq_params)
            check_context(context, self.training, get_pg_size(self.pg_collection.cp), type(self).__name__)
            if context.is_static_batching():
                self.plans.arrivals.check_chunk_mask(attention_mask, len(mixed), int(context.sequence_len_offset))
            else:
                check_dynamic(context, attention_mask, len(mixed), mixed.shape[1], type(self).__name__)
            self.plans.arrivals.check_rotary(rotary_pos_emb, self.config.kv_channels, self.config.rotary)
            return self.linear_proj(self._append(mixed, context))
        rank_plan = self._rank_plan(mixed, packed_seq_params)
        self.plans.arrivals.check_mask(attention_mask, rank_plan.plan, rank_plan.given, rank_plan.rank)
        self.plans.arrivals.check_rotary(rotary_pos_emb, self.config.kv_channels, self.config.rotary)
        if rank_plan.deal is not None:  # the first to send anything; otherwise nsa_attention makes sure
            config, comm = self.config, self.comm
            heads = local_heads(config, get_pg_size(self.pg_collection.tp), mixed.dtype)
            check_agreement(rank_plan.plan, config.nsa, heads, config.nsa_fetch, comm)
            mixed = rank_plan.deal.to_plan(mixed, comm)

        def core(*projected: Tensor) -> Tensor:
            return self.core_attention(*projected, rank_plan)

        projected = self._split(mixed)
        if self.checkpoint_core_attention and self.training:
            out = tensor_parallel.checkpoint(core, False, *projected)
        else:
            out = core(*projected)
        if rank_plan.deal is not None:
            out = rank_plan.deal.from_plan(out, self.comm)
        return self.linear_proj(out)

    def backward_dw(self) -> None:
        """Weight gradients that Transformer Engine delayed."""
        self.linear_proj.backward_dw()
        self.linear_qkv.backward_dw()

    def _rank_plan(self, mixed: Tensor, packed: PackedSeqParams | None) -> RankPlan:
        tokens, samples, _ = mixed.shape
        place = Place.of(self.pg_collection, mixed.device)
        if packed is None:
            return self.plans.of_sequence(tokens, place)
        if samples > 1:
            raise ValueError(
                f"packed_seq_params came with {samples} samples, but it bounds the documents of one row; put the "
                f"samples into one row [1, {samples} * s] and their bounds behind each other, as "
                f"megatron.core.utils.flatten_batch_for_packed_sequences does, or set micro_batch_size=1"
            )
        _refuse_other_group(packed, self.pg_collection.cp, place.cp_size)
        return self.plans.of_packed(packed, tokens, place)


class NSASelfAttention(PlannedSelfAttention):
    """Replaces `SelfAttention` in a layer spec; see `nsa_layer_spec`.

    Of a key/value head `linear_qkv` projects, with G = query heads per key/value head:

        [ q: G * Dk | k_cmp v_cmp k_slc v_slc k_win v_win: 3 * (Dk + Dv), or one pair if shared | gate: 3 * G ]
    """

    core_attention: NSACoreAttention

    @property
    def branches(self) -> tuple[str, ...]:
        return ("shared",) if self.config.nsa_shared_kv else ("cmp", "slc", "win")

    @property
    def group_widths(self) -> list[int]:
        return nsa_group_widths(self.config)

    @property
    def comm(self) -> Comm:
        return self.core_attention.comm  # with what counts its bytes

    def _build_core(self) -> NSACoreAttention:
        return NSACoreAttention(self.config, self.pg_collection, self.rotary)

    def _append(self, mixed: Tensor, context: Any) -> Tensor:
        with torch.no_grad():
            return self.core_attention.append(*self._split(mixed), context, self.layer_number)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [s, b, Hq, Dk], kv [s, b, Hkv, pairs * (Dk + Dv)], gate logits [s, b, Hq, 3], local heads."""
        q, kv, gate_logits = self._parts(mixed)
        return *self._normed(q, kv), gate_logits.unflatten(-1, (-1, 3)).flatten(2, 3)


def nsa_group_widths(config: NSATransformerConfig) -> list[int]:
    """Columns of an NSA layer's `linear_qkv` for one key/value head: queries, keys and values, gate logits."""
    group = config.num_attention_heads // config.num_query_groups
    pairs = 1 if config.nsa_shared_kv else 3
    return [group * config.kv_channels, pairs * (config.kv_channels + config.v_head_dim), group * 3]


def _refuse_other_group(packed: PackedSeqParams, group: Any, cp_size: int) -> None:
    """Megatron's hybrid context parallelism gives packs groups of their own."""
    size, own = getattr(packed, "local_cp_size", None), getattr(packed, "cp_group", None)
    if (own is not None and own is not group) or size not in (None, cp_size):
        raise ValueError(
            f"packed_seq_params has local_cp_size={size} and a cp_group of its own, but this layer's tokens are cut "
            f"over its own context-parallel group of {cp_size}; turn hybrid_context_parallel off, or set both to None"
        )


class _NotBuilt(nn.Module):
    """Stands where Megatron's `Attention` would build modules of a shape that NSA does not have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def _refuse(who: str, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"{who} was given {', '.join(given)}, which it does not support: it trains and evaluates causal "
            f"self-attention over whole sequences; leave {', '.join(given)} out, or use Megatron's own attention"
        )
