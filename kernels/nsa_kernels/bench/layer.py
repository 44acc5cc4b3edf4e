"""The whole layer as its users call it: `nsa_attention` over a case's tokens, as it is or captured in CUDA graphs."""

from collections.abc import Callable
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsa_dist import BranchKV, nsa_attention
from nsa_kernels.bench.inputs import CONFIG, LayerInputs


def whole_layer(x: LayerInputs, ops: ModuleType | None = None) -> Callable[[], Tensor]:
    """() -> out [T, Hq, Dv]; differentiable by the leaves of `x`."""
    kv = BranchKV(*(t for pair in x.raw.values() for t in pair))
    compress_k, compress_v = (_Phi(weights) for weights in x.phi)
    bounds = torch.tensor([*accumulate(x.case.documents, initial=0)]) if x.case.documents else None

    def forward() -> Tensor:
        out = nsa_attention(
            x.q, kv, x.gates, CONFIG, compress_k=compress_k, compress_v=compress_v, cu_seqlens=bounds, ops=ops
        )
        assert isinstance(out, Tensor)  # block_indices were not asked for
        return out

    return forward


def captured_layer(x: LayerInputs) -> Callable[[], Tensor]:
    """() -> out, as `whole_layer`, by a graph of the forward and one of the backward: what the host takes falls away.

    Beside the kernels, backward copies the output's gradient into the graph.
    """
    graphed: Any = torch.cuda.make_graphed_callables(
        lambda *leaves: whole_layer(x.with_leaves(leaves))(), tuple(x.leaves)
    )
    return lambda: graphed(*x.leaves)


class _Phi:
    """The MLP of `compress_mlp` over rows where they lie."""

    takes_rows = True

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def mlp_weights(self) -> tuple[Tensor, ...]:
        return self.weights["pos_emb"], self.weights["w1"], self.weights["w2"]

    def __call__(self, rows: Tensor, block_start: Tensor, *, block_rows: Tensor, ops: ModuleType) -> Tensor:
        return ops.compress_mlp(rows, block_rows, **self.weights)
