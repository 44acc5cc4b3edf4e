"""One case: every branch, the whole layer and dense attention, each checked, then timed. Returns rows of figures."""

import gc
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_kernels import reference
from nsa_kernels.bench.branches import Branch, branches
from nsa_kernels.bench.cases import CAPTURED_TOKENS, Case
from nsa_kernels.bench.checks import Wanted, check_branch, check_layer, complaints, sample_rows
from nsa_kernels.bench.inputs import make_inputs, random
from nsa_kernels.bench.layer import captured_layer, measure_pack, whole_layer
from nsa_kernels.bench.timing import Row, Timer, time_both


def measure_case(case: Case, timer: Timer, dense_limit_s: float) -> list[Row]:
    """A row for every branch, `all` for the layer as it is called, `dense` for dense causal attention.

    Of short cases also `all, captured`, the layer in CUDA graphs. Packs: see `layer`.
    """
    if case.documents:
        return attempted("all", lambda: measure_pack(case, timer))
    rows: list[Row] = []
    wanted = Wanted()
    steps: list[tuple[str, Callable[[], Row]]] = [
        ("branches", lambda: _measure_branches(case, timer, rows, wanted)),
        ("all", lambda: _measure_layer(case, timer, rows, wanted)),
        ("dense", lambda: _measure_dense(case, timer, dense_limit_s)),
    ]
    if case.tokens <= CAPTURED_TOKENS:
        steps.insert(2, ("all, captured", lambda: _measure_captured(case, timer, rows)))
    for step, measure in steps:
        rows += attempted(step, measure)
    return rows


def attempted(step: str, measure: Callable[[], Row | list[Row]]) -> list[Row]:
    """The rows of `measure`, or one that says why there are none."""
    try:
        found = measure()
        return found if isinstance(found, list) else [found] if found else []
    except torch.cuda.OutOfMemoryError:
        return [{"step": step, "note": "out of memory"}]
    except Exception as error:  # a kernel that does not compile must not take the other cases with it
        traceback.print_exc()
        return [{"step": step, "note": f"FAILED: {type(error).__name__}: {str(error)[:100]!r}"}]
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _measure_branches(case: Case, timer: Timer, rows: list[Row], wanted: Wanted) -> Row:
    for branch in branches(make_inputs(case)):
        wrong = check_branch(branch, wanted)
        row = {"note": f"WRONG: {wrong}"} if wrong else _time_branch(branch, timer)
        rows.append({"step": branch.name, **row})
    return {}


def _time_branch(branch: Branch, timer: Timer) -> Row:
    row: Row = {**timer.row("backward" if branch.in_backward else "forward", branch.forward)}
    if branch.leaves:
        output = branch.forward()
        grad = torch.randn_like(output[0] if isinstance(output, tuple) else output)
        row |= timer.row("backward", branch.backward(output, grad))
    return row | _rates(row, branch.flops, branch.backward_flops)


def _rates(row: Row, flops: float, backward_flops: float) -> Row:
    pairs = (("forward", flops), ("backward", backward_flops))
    return {f"{d}_TFLOP_per_s": n / float(row[f"{d}_ms"]) / 1e9 for d, n in pairs if n and f"{d}_ms" in row}


def _measure_layer(case: Case, timer: Timer, rows: list[Row], wanted: Wanted) -> Row:
    """One call of `nsa_attention`, and one of its backward."""
    if any("WRONG" in str(row.get("note", "")) for row in rows):
        return {"step": "all", "note": "WRONG: a branch is"}
    x = make_inputs(case)
    forward = whole_layer(x)
    wrong = check_layer(x, forward(), wanted)
    if wrong:
        return {"step": "all", "note": f"WRONG: {wrong}"}
    grad = random((case.tokens, case.num_q_heads, case.dim_v), x.generator, x.q.device.type)
    row, differing = time_both(timer, forward, x.leaves, grad)
    if differing:
        return {"step": "all", "note": "WRONG: another run has other gradients, or one is not finite"}
    return {"step": "all", **row}


def _measure_captured(case: Case, timer: Timer, rows: list[Row]) -> Row:
    """The layer in CUDA graphs, whose bits must be those of `all`. Memory is the graphs' own, and not looked at."""
    if any("WRONG" in str(row.get("note", "")) for row in rows):
        return {"step": "all, captured", "note": "WRONG: the layer is"}
    x = make_inputs(case)
    grad = random((case.tokens, case.num_q_heads, case.dim_v), x.generator, x.q.device.type)
    forward = captured_layer(x)

    def results(layer: Callable[[], Tensor]) -> list[Tensor]:
        out = layer()
        return [t.clone() for t in (out.detach(), *torch.autograd.grad(out, x.leaves, grad))]

    if not all(map(torch.equal, results(forward), results(whole_layer(x)))):
        return {"step": "all, captured", "note": "WRONG: other bits than without capture"}
    return {
        "step": "all, captured",
        **timer.row("forward", forward),
        **timer.row("backward", lambda out: torch.autograd.grad(out, x.leaves, grad), before=forward),
    }


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
    q32, k32, v32 = (t.detach().float() for t in (x.q[rows], *x.raw["slc"]))
    expected, _ = reference.window_attention(q32, k32, v32, begin, end, softmax_scale=case.softmax_scale)
    wrong = complaints({"out": (out[0].transpose(0, 1)[rows], expected)})
    if wrong:
        return {"step": "dense", "note": f"WRONG: {wrong}"}
    row, _ = time_both(timer, forward, [q, k, v], torch.randn_like(out))  # cuDNN's gradients may differ from run to run
    return {"step": "dense", **row, **_rates(row, flops, 2.5 * flops)}
