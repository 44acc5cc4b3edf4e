"""Which experts a token takes, and the loss that evens their shares of each sample."""

from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.nn import functional

from nsa_dist.cp.comm import Comm


class SampleTokens(NamedTuple):
    """Of a micro-batch on this context-parallel rank, which sample each token is of."""

    sample: Tensor  # int64 [T * b] in the order of hidden states [T, b, hidden]; -1 is padding
    num_samples: int
    length: int  # tokens of a sample over all ranks


class SampleRouter(TopKRouter):
    """Megatron's weights and its choice of experts; logits in fp32; a balance loss of its own while it trains:

        loss of a sample = E * sum_e f_e * P_e      1 where all experts are alike, up to E / topk where they are not
        f_e    the share of expert e in the sample's choices, topk a token; no gradient passes through it
        P_e    the mean over the sample's tokens of a softmax over all experts

    The expert-level loss of DeepSeek-V2 (arXiv:2405.04434, section 2.2.3), `seq_aux_loss` to Megatron, of a sample
    where they have a sequence. It is the same however a sample is cut, and whatever samples it is computed with. To the
    sum of token losses, of which a step takes the mean, every sample adds `moe_aux_loss_coeff` times its loss once a
    token.

    Megatron's own is not: of 0.16 its weight is divided by the ranks that share the tokens, and by the samples of a
    micro-batch; to any version the row of a pack is one sample, and its padding is tokens.

    `tokens` is set before each forward of training. `seen` fp64 [E + 1] adds up, over this rank's tokens, how many took
    each expert, and its part of the samples' losses.
    """

    tokens: SampleTokens
    seen: Tensor

    def __init__(self, config: Any, pg_collection: Any = None, **of_newer: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **of_newer)
        self.start_counting()

    def start_counting(self) -> None:
        self.seen = torch.zeros(self.num_experts + 1, dtype=torch.float64, device=self.weight.device)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """input [T, b, hidden] -> weights fp32 [T * b, E], 0 for experts that are not taken, and bool: those that are.

        padding_mask    is Megatron's argument: `tokens` says what is padding.
        """
        logits = functional.linear(input.float(), self.weight.float()).flatten(0, -2)
        weights, taken = topk_routing_with_score_function(
            logits, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax
        )
        if self.training and torch.is_grad_enabled():
            weights = self._balanced(weights, logits, taken)
        return weights, taken

    def _balanced(self, weights: Tensor, logits: Tensor, taken: Tensor) -> Tensor:
        """`weights`, with the loss behind them: backward begins at both."""
        of_sample = self._one_hot(logits)
        counts, scores = of_sample @ taken.to(logits.dtype), of_sample @ logits.softmax(-1)
        everyones = Comm(self.tp_cp_group).all_gather(counts, "experts").view(-1, *counts.shape).sum(0)
        length = self.tokens.length
        loss = (everyones * scores).sum() * (self.num_experts / (self.topk * length**2))
        self.seen += torch.cat([counts.sum(0), loss.detach()[None]])
        return MoEAuxLossAutoScaler.apply(weights, self.config.moe_aux_loss_coeff * length * loss)

    def _one_hot(self, logits: Tensor) -> Tensor:
        """[samples, T * b]; sequence parallelism leaves a tensor-parallel rank its share of the tokens."""
        mine = self.tokens.sample.to(logits.device)
        if self.config.sequence_parallel:
            mine = mine.chunk(get_pg_size(self.tp_group))[get_pg_rank(self.tp_group)]
        return (mine == torch.arange(self.tokens.num_samples, device=mine.device)[:, None]).to(logits.dtype)


def route_by_samples(layer: ModuleSpec) -> None:
    """Give a layer of experts this router. Of 0.19 on Megatron's spec of their MLP is a `functools.partial`."""
    mlp = layer.submodules.mlp
    moe = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    moe.router = SampleRouter
