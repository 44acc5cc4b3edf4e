"""One case: every branch, the whole layer and dense attention, each checked, then timed. Returns rows of figures."""

import gc
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_cases import Case
from bench_checks import check_branch, complaints, sample_rows
from bench_layer import branches, make_inputs, whole_layer
from bench_timing import Timer, peak_gib
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_kernels import reference

Row = dict[str, float | str]


def measure_case(case: Case, timer: Timer, dense_limit_s: float) -> list[Row]:
    """A row for every branch, `all` for the layer as it is called, `dense` for dense causal attention."""
    rows: list[Row] = []
    steps: list[tuple[str, Callable[[], Row]]] = [
        ("branches", lambda: _measure_branches(case, timer, rows)),
        ("all", lambda: _measure_layer(case, timer, rows)),
        ("dense", lambda: _measure_dense(case, timer, dense_limit_s)),
    ]
    for step, measure in steps:
        try:
            row = measure()
        except torch.cuda.OutOfMemoryError:
            row = {"step": step, "note": "out of memory"}
        except Exception as error:  # a kernel that does not compile must not take the other cases with it
            traceback.print_exc()
            row = {"step": step, "note": f"FAILED: {type(error).__name__}: {str(error)[:100]!r}"}
        if row:
            rows.append(row)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _measure_branches(case: Case, timer: Timer, rows: list[Row]) -> Row:
    for branch in branches(make_inputs(case)):
        wrong = check_branch(branch)
        if wrong:
            rows.append({"step": branch.name, "note": f"WRONG: {wrong}"})
            continue
        if branch.leaves:
            row = _time(timer, lambda b=branch: _first(b.forward()), branch.leaves)
        else:
            row = {"forward_ms": timer.median_ms(branch.forward)}
        for direction, flops in (("forward", branch.flops), ("backward", branch.backward_flops)):
            if flops and f"{direction}_ms" in row:
                row[f"{direction}_TFLOP_per_s"] = flops / row[f"{direction}_ms"] / 1e9
        rows.append({"step": branch.name, **row})
    return {}


def _measure_layer(case: Case, timer: Timer, rows: list[Row]) -> Row:
    """The layer calls the branches checked before: here its gradients need only exist and repeat bit by bit."""
    if any("WRONG" in str(row.get("note", "")) for row in rows):
        return {"step": "all", "note": "WRONG: a branch is"}
    x = make_inputs(case)
    forward = whole_layer(x)
    out = forward()
    grad = torch.randn_like(out)
    first = torch.autograd.grad(out, x.leaves, grad)
    again = torch.autograd.grad(forward(), x.leaves, grad)
    if not all(bool(a.isfinite().all()) and torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        return {"step": "all", "note": "WRONG: a second run has other gradients, or one is not finite"}
    del out, grad, first, again
    return {"step": "all", **_time(timer, forward, x.leaves)}


def _time(timer: Timer, forward: Callable[[], Tensor], leaves: list[Tensor]) -> Row:
    row: Row = {"peak_gib": peak_gib(forward, leaves), "forward_ms": timer.median_ms(forward)}
    out = forward()
    grad = torch.randn_like(out)
    row["backward_ms"] = timer.median_ms(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    return row


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _measure_dense(case: Case, timer: Timer, limit_s: float) -> Row:
    """Causal attention to every token through cuDNN, forward plus backward within `limit_s`."""
    flops = 1.0 * case.tokens**2 * case.num_q_heads * (case.dim_k + case.dim_v)
    if 3.5 * flops / 500e12 > limit_s:
        return {"step": "dense", "note": f"left out: {3.5 * flops / 500e12:.0f} s at 500 TFLOP/s, limit {limit_s:g} s"}
    x = make_inputs(case)
    q, k, v = (t.detach().transpose(0, 1)[None].requires_grad_() for t in (x.q, *x.raw["slc"]))

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        out = forward()
    except RuntimeError as error:
        return {"step": "dense", "note": f"cuDNN takes no such shape: {str(error).splitlines()[0][:80]}"}
    rows = sample_rows(case.tokens, q.device)
    end = (rows + 1).to(torch.int32)
    begin = torch.zeros_like(end)
    tensors = (x.q.detach()[rows].float(), *(t.detach().float() for t in x.raw["slc"]))
    expected, _ = reference.window_attention(*tensors, begin, end, softmax_scale=case.softmax_scale)
    wrong = complaints({"out": (out[0].transpose(0, 1)[rows], expected)})
    if wrong:
        return {"step": "dense", "note": f"WRONG: {wrong}"}
    row = _time(timer, forward, [q, k, v])
    for direction, factor in (("forward", 1.0), ("backward", 2.5)):
        row[f"{direction}_TFLOP_per_s"] = factor * flops / row[f"{direction}_ms"] / 1e9
    return {"step": "dense", **row}
