"""The core of the layer: from projected q, k, v and gate logits to the attention's output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_size
from torch import Tensor
from torch.nn.functional import pad

from nsa_dist.attention import BranchKV, nsa_attention
from nsa_dist.compress import MeanCompress
from nsa_dist.cp.comm import Comm, Traffic
from nsa_dist.cp.formulas.batches import samples_a_call
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.inference.cache import NSACache
from nsa_dist.mcore.compressor import GateBias, ParallelCompressMLP
from nsa_dist.mcore.config import NSATransformerConfig
from nsa_dist.mcore.inference.dynamic import RequestCache, Step, attend_requests, pages_for, request_cache
from nsa_dist.mcore.inference.static import LayerCache, attend
from nsa_dist.mcore.plans import RankPlan
from nsa_dist.rope_scaling import Rotary


class NSACoreAttention(MegatronModule):
    """Rotary positions, compression and `nsa_attention`. Its parameters are phi's and the gates' bias."""

    def __init__(self, config: NSATransformerConfig, pg_collection: ProcessGroupCollection, rotary: Rotary) -> None:
        super().__init__(config=config)
        self.rotary = rotary
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp if get_pg_size(pg_collection.cp) > 1 else None
        turned = rotary if config.nsa_compress_before_rope else None
        self.compress_k = _build_compressor(config, config.kv_channels, pg_collection, turned)
        self.compress_v = _build_compressor(config, config.v_head_dim, pg_collection, None)
        self.gate = GateBias(config, pg_collection) if config.nsa_gate_bias else torch.nn.Identity()
        self._recorded: list[Tensor] | None = None
        self._traffic: Traffic | None = None
        self._observe: Callable[[Tensor, Tensor, Tensor], None] | None = None

    def forward(self, q: Tensor, kv: Tensor, gate_logits: Tensor, rank_plan: RankPlan) -> Tensor:
        """q [T, b, Hq, Dk], kv [T, b, Hkv, pairs * (Dk + Dv)], gate_logits [T, b, Hq, 3] -> [T, b, Hq * Dv].

        A batch is a pack: its samples are documents one behind the other, as many in a call as `samples_a_call` says.
        """
        count = samples_a_call(rank_plan.plan, q.shape[1], q[0, 0].numel())
        parts = (x.transpose(0, 1).split(count) for x in (q, kv, gate_logits))  # [count, T, ...] each
        outs = []
        for its_q, its_kv, its_logits in zip(*parts, strict=True):
            rows = [x.flatten(0, 1) for x in (its_q, its_kv, its_logits)]
            out = self._attend(rows[0], rows[1], rows[2], rank_plan.of_batch(count))
            outs.append(out.unflatten(0, (count, -1)))
        return torch.cat(outs).flatten(2).transpose(0, 1)

    @contextmanager
    def recording_blocks(self) -> Iterator[list[Tensor]]:
        """Inside, every sample's block_indices, int32 [T, Hkv, n], are appended to the list this yields.

        Of a pack that came as one they are one entry, by the ids of the pack.
        """
        recorded: list[Tensor] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    @contextmanager
    def observing(self, observe: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Inside, `observe(gates [T, Hq, 3], block_indices [T, Hkv, n], own_block [T])` is called for every call.

        Of its tokens without padding. Blocks are counted from the first of a token's own document; -1 for none.
        """
        self._observe = observe
        try:
            yield
        finally:
            self._observe = None

    @property
    def comm(self) -> Comm:
        """The context-parallel group, with what counts its bytes."""
        return Comm(self.cp_group, self._traffic or Traffic())

    @contextmanager
    def counting(self, traffic: Traffic) -> Iterator[None]:
        """Inside, every call adds to `traffic` what it sends, in its backward as well."""
        self._traffic = traffic
        try:
            yield
        finally:
            self._traffic = None

    def _attend(self, q: Tensor, kv: Tensor, gate_logits: Tensor, rank_plan: RankPlan) -> Tensor:
        plan = rank_plan.plan
        if plan.cp_size == 1:  # pads documents to whole blocks; more ranks were given whole blocks
            q, kv, gate_logits = (plan.shard(x, 0) for x in (q, kv, gate_logits))
        gates = self._gates(gate_logits)
        out, block_indices = nsa_attention(
            self._rotate(q, rank_plan),
            self._branches(kv, rank_plan),
            gates,
            self.config.nsa,
            compress_k=self.compress_k,
            compress_v=self.compress_v,
            plan=plan,
            cp_group=self.cp_group,
            softmax_scale=self.config.softmax_scale,
            fetch=self.config.nsa_fetch,
            traffic=self._traffic,
            return_block_indices=True,
        )
        if self._observe is not None:
            self._observe(*_seen(gates, block_indices, rank_plan))
        if plan.cp_size == 1:
            out = plan.unshard([out])
        if self._recorded is not None:
            self._record(plan.unshard([block_indices]) if plan.cp_size == 1 else block_indices, rank_plan)
        return out

    def _record(self, block_indices: Tensor, rank_plan: RankPlan) -> None:
        """Sample by sample."""
        assert self._recorded is not None
        for i, its_blocks in enumerate(block_indices.chunk(rank_plan.samples)):
            moved = its_blocks - i * rank_plan.blocks_of_sample
            self._recorded.append(torch.where(its_blocks >= 0, moved, its_blocks))

    def append(self, q: Tensor, kv: Tensor, gate_logits: Tensor, context: Any, layer_number: int) -> Tensor:
        """As `forward`, of new tokens behind those that the inference context has of each sample or request."""
        if not context.is_static_batching():
            return self._append_requests(q[:, 0], kv[:, 0], gate_logits[:, 0], context, layer_number)[:, None]
        tokens, samples = q.shape[:2]
        layer = context.key_value_memory_dict.get(layer_number)
        if layer is None:
            pages = context.max_batch_size * -(-context.max_sequence_length // self.config.nsa.slc_block_len)
            layer = LayerCache(self._make_cache(q, kv, pages, context.max_batch_size), context.max_batch_size)
            context.key_value_memory_dict[layer_number] = layer
        offset = int(context.sequence_len_offset)
        seqs = layer.rows(int(context.batch_size_offset), samples, offset)
        plan = ShardPlan.contiguous([0, samples * tokens], 1, self.config.nsa.slc_block_len)
        position = (offset + torch.arange(tokens, device=q.device)).repeat(samples)
        step = RankPlan(plan, 0, position, plan)  # what turns keys and queries asks for their positions

        def by_sample(x: Tensor) -> Tensor:
            return x.unflatten(0, (samples, tokens))

        q, kv, gates = (x.transpose(0, 1).flatten(0, 1) for x in (q, kv, self._gates(gate_logits)))
        branches = BranchKV(*map(by_sample, self._branches(kv, step)))
        scale = self.config.softmax_scale
        out = attend(by_sample(self._rotate(q, step)), branches, by_sample(gates), layer, seqs, scale)
        return out.flatten(2).transpose(0, 1)

    def _append_requests(self, q: Tensor, kv: Tensor, gate_logits: Tensor, context: Any, layer_number: int) -> Tensor:
        """[rows, ...] of a dynamic context, its active tokens first -> [rows, Hq * Dv]."""
        step, rows = Step.of(context), len(q)
        layer = request_cache(context, layer_number)
        if layer is None:
            layer = RequestCache(self._make_cache(q, kv, pages_for(context, self.config.nsa.slc_block_len)))
            context.nsa_layers[layer_number] = layer
        q, kv, gate_logits = (x[: step.num_tokens] for x in (q, kv, gate_logits))
        plan = ShardPlan.contiguous([0, step.num_tokens], 1, self.config.nsa.slc_block_len)
        turned = RankPlan(plan, 0, step.positions(q.device), plan)
        out = attend_requests(
            self._rotate(q, turned), self._branches(kv, turned), self._gates(gate_logits), layer, step,
            self.config.softmax_scale,
        )  # fmt: skip
        return pad(out.flatten(1), (0, 0, 0, rows - len(out)))

    def _make_cache(self, q: Tensor, kv: Tensor, pages: int, max_sequences: int = 0) -> NSACache:
        config = self.config
        return NSACache(
            config.nsa, kv.shape[-2], config.kv_channels, config.v_head_dim, pages, dtype=q.dtype, device=q.device,
            compress_k=self.compress_k, compress_v=self.compress_v, max_sequences=max_sequences,
        )  # fmt: skip

    def _gates(self, logits: Tensor) -> Tensor:
        """Their sigmoid, in fp32 or better."""
        return torch.sigmoid(self.gate(logits.to(torch.promote_types(logits.dtype, torch.float32))))

    def _branches(self, kv: Tensor, rank_plan: RankPlan) -> BranchKV:
        """The pairs of `kv` [T, Hkv, pairs * (Dk + Dv)] as branches; keys that are rotated before use are."""
        dims = [self.config.kv_channels, self.config.v_head_dim]
        if self.config.nsa_shared_kv:
            k, v = kv.split(dims, -1)
            turned = self._rotate(k, rank_plan)
            return BranchKV(k if self.config.nsa_compress_before_rope else turned, v, turned, v, turned, v)
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = kv.split(dims * 3, -1)
        if not self.config.nsa_compress_before_rope:
            k_cmp = self._rotate(k_cmp, rank_plan)
        return BranchKV(k_cmp, v_cmp, self._rotate(k_slc, rank_plan), v_slc, self._rotate(k_win, rank_plan), v_win)

    def _rotate(self, x: Tensor, rank_plan: RankPlan) -> Tensor:
        return rank_plan.turns(self.rotary, x.shape[-1], x.dtype).of(x)


def _seen(gates: Tensor, block_indices: Tensor, rank_plan: RankPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the plan as `observing` shows them."""
    is_token, first, own = rank_plan.document_blocks
    chosen = torch.where(block_indices >= 0, block_indices - first[:, None, None], -1)
    return gates[is_token], chosen[is_token], own[is_token]


def _build_compressor(
    config: NSATransformerConfig, head_dim: int, pg_collection: ProcessGroupCollection, rotary: Rotary | None
) -> torch.nn.Module:
    if config.nsa_compression == "mean":
        return MeanCompress(config.nsa.cmp_block_len, rotary)
    return ParallelCompressMLP(config, head_dim, pg_collection, rotary)
