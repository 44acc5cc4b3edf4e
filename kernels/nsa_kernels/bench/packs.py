"""A pack of documents: the whole layer, beside one document of as many tokens and what the pack's own work asks for.

Work is FLOPs of visible (query, key) pairs. `by own work` is the time of the one document, times the share of its work
that the pack has: what a pack costs at the efficiency of a long document.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nsa_kernels.bench.cases import Case
from nsa_kernels.bench.checks import complaints
from nsa_kernels.bench.inputs import CONFIG, LayerInputs, make_inputs, random
from nsa_kernels.bench.layer import whole_layer
from nsa_kernels.bench.timing import Row, Timer, time_both


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
