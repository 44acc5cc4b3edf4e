"""The benchmark's layer through the kernels against the fp64 reference, and its refusal of wrong results."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nsa_kernels
from kernels.judge import assert_twice
from nsa_kernels import reference

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))

from bench_cases import Case
from bench_checks import check_branch, sample_rows
from bench_layer import Bounds, branches, layer, make_inputs

CASE = Case(tokens=320, num_q_heads=4, num_kv_heads=2, dim_k=32, dim_v=16)


@pytest.fixture(scope="module")
def checked(device):
    """The branches of a small case, each with the complaint of its check."""
    return [(branch, check_branch(branch)) for branch in branches(make_inputs(CASE, device.type))]


def test_every_branch_passes_its_check(checked):
    assert [(branch.name, complaint) for branch, complaint in checked if complaint] == []
    assert len(checked) == 7


def test_a_wrong_result_is_refused(checked):
    """One key row of the reference's input is changed: the output, or a gradient, is another one."""
    for branch, _ in checked:
        if branch.name in ("cmp", "slc", "win"):
            wrong = replace(branch, others={**branch.others, "softmax_scale": 1.1 * CASE.softmax_scale})
            wrong.forward = lambda ops=None, right=branch: right.forward()
            assert "out" in check_branch(wrong)


def test_sampled_rows_are_ordered_and_hold_both_ends(device):
    rows = sample_rows(1000, device)
    assert rows[0] == 0
    assert rows[-1] == 999
    assert (rows.diff() > 0).all()
    assert sample_rows(3, device).tolist() == [0, 1, 2]


def test_layer_and_every_gradient_against_the_reference(device):
    """All kernels together, in fp32, where both sides choose the same blocks."""
    x = make_inputs(CASE, device.type)
    bounds = Bounds.of(CASE, device.type)
    results = {}
    grad = torch.randn(CASE.tokens, CASE.num_q_heads, CASE.dim_v, device=device)
    for name, ops, dtype in (
        ("actual", nsa_kernels, torch.float32),
        ("plain", reference, torch.float32),
        ("exact", reference, torch.float64),
    ):
        cast = _cast(x, dtype)
        out = layer(cast, bounds, ops)
        results[name] = out.detach(), *torch.autograd.grad(out, cast.leaves, grad.to(dtype))
    for i, (a, p, e) in enumerate(zip(results["actual"], results["plain"], results["exact"], strict=True)):
        assert_twice(f"result {i}", a, p, e, floor=1e-5)


def _cast(x, dtype):
    def cast(t):
        return t.detach().to(dtype).requires_grad_()

    return replace(
        x,
        q=cast(x.q),
        raw={name: (cast(k), cast(v)) for name, (k, v) in x.raw.items()},
        gates=cast(x.gates),
        phi=[{name: cast(t) for name, t in phi.items()} for phi in x.phi],
    )
