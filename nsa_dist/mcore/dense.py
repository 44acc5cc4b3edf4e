"""Dense causal attention in the place of NSA's: the twin that a model is compared with, or some of its layers."""

from itertools import pairwise

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_size
from torch import Tensor
from torch.nn import functional

from nsa_dist.mcore.attention import PlannedSelfAttention, nsa_group_widths
from nsa_dist.mcore.config import NSATransformerConfig
from nsa_dist.mcore.core import NSACoreAttention
from nsa_dist.mcore.plans import RankPlan
from nsa_dist.rope import Positions
from nsa_dist.rope_scaling import Rotary


class DenseSelfAttention(PlannedSelfAttention):
    """`NSASelfAttention` with one softmax over all earlier tokens of the document: one K/V pair, no gates, no phi.

    Of a key/value head `linear_qkv` projects [ q: G * Dk | k v: Dk + Dv ]. What both kinds of layer have is drawn
    alike: `linear_qkv` takes the rows of q and of the selected branch's pair out of the values that an NSA layer would
    have drawn, and the random numbers of everything else are used up, so that every weight after it is the same too.

    Raises ValueError under context parallelism, beside what `PlannedSelfAttention` raises.
    """

    @property
    def branches(self) -> tuple[str, ...]:
        return ("dense",)

    @property
    def group_widths(self) -> list[int]:
        queries, _, _ = nsa_group_widths(self.config)
        return [queries, self.config.kv_channels + self.config.v_head_dim]

    def _build_core(self) -> "DenseCoreAttention":
        NSACoreAttention(self.config, self.pg_collection, self.rotary)  # for the random numbers that its phi draws
        return DenseCoreAttention(self.config, self.pg_collection, self.rotary)

    def _draw_qkv(self, weight: Tensor) -> Tensor:
        widths, own = nsa_group_widths(self.config), self.group_widths
        groups = weight.shape[0] // sum(own)
        wide = weight.new_empty(groups * sum(widths), weight.shape[1])
        self.config.init_method(wide)
        skipped = 0 if self.config.nsa_shared_kv else own[1]  # the compressed branch's pair
        q, _, pair, _ = wide.unflatten(0, (groups, -1)).split(
            [own[0], skipped, own[1], sum(widths) - sum(own) - skipped], 1
        )
        with torch.no_grad():
            return weight.copy_(torch.cat([q, pair], 1).flatten(0, 1))

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """q [s, b, Hq, Dk], kv [s, b, Hkv, Dk + Dv], local heads."""
        q, kv = self._parts(mixed)
        return self._normed(q, kv)


class DenseCoreAttention(MegatronModule):
    """Rotary positions and PyTorch's `scaled_dot_product_attention`, which takes its fused kernel for the device."""

    def __init__(self, config: NSATransformerConfig, pg_collection: ProcessGroupCollection, rotary: Rotary) -> None:
        super().__init__(config=config)
        self.rotary = rotary
        if get_pg_size(pg_collection.cp) > 1:
            raise ValueError(
                f"a dense layer was built over {get_pg_size(pg_collection.cp)} context-parallel ranks, but it needs "
                f"all keys on every rank, which it does not gather; set context_parallel_size=1, or "
                f"nsa_attention='nsa'"
            )

    def forward(self, q: Tensor, kv: Tensor, rank_plan: RankPlan) -> Tensor:
        """q [T, b, Hq, Dk], kv [T, b, Hkv, Dk + Dv] -> [T, b, Hq * Dv]."""
        plan = rank_plan.plan
        k, v = kv.split([self.config.kv_channels, self.config.v_head_dim], -1)
        q, k = (self._turned(x, rank_plan.token_positions) for x in (q, k))
        documents = [slice(a, b) for a, b in pairwise(plan.cu_seqlens) if b > a]
        out = torch.cat([self._attend(q[which], k[which], v[which]) for which in documents])
        return out.flatten(2)

    def _turned(self, x: Tensor, positions: Positions) -> Tensor:
        """x [T, b, H, D]: samples are further heads to the rotation."""
        return positions.turns(self.rotary, x.shape[-1], x.dtype).of(x.flatten(1, 2)).view(x.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One document: q [T, b, Hq, Dk], k and v [T, b, Hkv, D] -> [T, b, Hq, Dv]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        # Of PyTorch's fused kernels only those for 16-bit numbers on a GPU let query heads share keys.
        has_groups = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        if not has_groups:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.config.softmax_scale, enable_gqa=has_groups
        )
        return out.permute(2, 0, 1, 3)
