"""The whole layer as its users call it: `nsa_attention` over a case's tokens, as it is or captured in CUDA graphs.

Of a pack also what its own work asks for. Work is FLOPs of visible (query, key) pairs. `by own work` is the time of one
document of as many tokens, times the share of its work that the pack has.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsa_dist import BranchKV, nsa_attention
from nsa_kernels.bench.cases import Case
from nsa_kernels.bench.checks import complaints
from nsa_kernels.bench.inputs import CONFIG, LayerInputs, make_inputs, random
from nsa_kernels.bench.timing import Row, Timer, time_both


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


def measure_pack(case: Case, timer: Timer) -> list[Row]:
    """Rows `all`, `one document`, `by own work` and `all / by own work`."""
    found, differing = _measured(case, timer)
    wrong = _check(case) or ("another run has other gradients, or one is not finite" if differing else "")
    if wrong:
        return [{"step": "all", "note": f"WRONG: {wrong}"}]
    one, _ = _measured(replace(case, documents=()), timer)
    share = work(case) / work(replace(case, documents=()))
    own = {key: float(one[key]) * share for key in ("forward_ms", "backward_ms")}
    ratio = {key: float(found[key]) / own[key] for key in own}
    return [
        {"step": "all", **found},
        {"step": "one document", **one},
        {"step": "by own work", **own},
        {"step": "all / by own work", **ratio},
    ]


def work(case: Case) -> float:
    """FLOPs of a forward, but for phi and what passes over rows: 2 per multiply-add of visible pairs."""
    total = 0.0
    for tokens in case.documents or (case.tokens,):
        position = torch.arange(tokens, dtype=torch.float64)
        seen_cmp = ((position + 1 - CONFIG.cmp_block_len + CONFIG.cmp_stride) // CONFIG.cmp_stride).clamp(min=0).sum()
        length = CONFIG.slc_block_len
        seen_slc = ((position // length).clamp(max=CONFIG.num_slc_blocks - 1) * length + position % length + 1).sum()
        seen_win = (position + 1).clamp(max=CONFIG.window_len).sum()
        pairs = (seen_cmp + seen_slc + seen_win) * (case.dim_k + case.dim_v) + seen_cmp * case.dim_k
        total += 2.0 * case.num_q_heads * float(pairs)
    return total


def _measured(case: Case, timer: Timer) -> tuple[Row, bool]:
    x = make_inputs(case)
    grad = random((case.tokens, case.num_q_heads, case.dim_v), x.generator, x.q.device.type)
    return time_both(timer, whole_layer(x), x.leaves, grad)


def _check(case: Case) -> str:
    """What is wrong with the first and the last document, out and gradients of q, compared with each alone."""
    x = make_inputs(case)
    grad = random((case.tokens, case.num_q_heads, case.dim_v), x.generator, x.q.device.type)
    pack = _results(whole_layer(x), x, grad)
    wrong = []
    for rows in (slice(0, case.documents[0]), slice(case.tokens - case.documents[-1], case.tokens)):
        alone = _rows_of(x, rows)
        found = _results(whole_layer(alone), alone, grad[rows])
        names = zip(("out", "d q"), pack, found, strict=True)
        wrong.append(complaints({name: (a[rows].float(), b.float()) for name, a, b in names}))
    return ", ".join(text for text in wrong if text)


def _rows_of(x: LayerInputs, rows: slice) -> LayerInputs:
    """One document of a pack as a layer of its own."""
    cut = [t.detach()[rows].requires_grad_() if len(t) == x.case.tokens else t for t in x.leaves]
    length = rows.stop - rows.start
    return replace(x.with_leaves(cut), case=replace(x.case, tokens=length, documents=()))


def _results(forward: Callable[[], Tensor], x: LayerInputs, grad: Tensor) -> tuple[Tensor, Tensor]:
    out = forward()
    return out.detach(), torch.autograd.grad(out, [x.q], grad)[0]
