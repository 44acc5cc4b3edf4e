"""The benchmark's layer through the kernels against the fp64 reference, and its refusal of wrong results."""

from dataclasses import replace

import pytest
import torch

import nsa_kernels
from kernels.judge import assert_twice
from nsa_kernels import reference
from nsa_kernels.bench.branches import branches
from nsa_kernels.bench.cases import Case
from nsa_kernels.bench.checks import Wanted, check_branch, check_layer, sample_rows
from nsa_kernels.bench.compile import branches_alone
from nsa_kernels.bench.inputs import make_inputs
from nsa_kernels.bench.layer import whole_layer
from nsa_kernels.bench.report import Report

CASE = Case(tokens=320, num_q_heads=4, num_kv_heads=2, dim_k=32, dim_v=16)


@pytest.fixture(scope="module")
def checked(device):
    """The branches of a small case, each with the complaint of its check, and what the layer should then be."""
    wanted = Wanted()
    return [(branch, check_branch(branch, wanted)) for branch in branches(make_inputs(CASE, device.type))], wanted


def test_every_branch_passes_its_check(checked):
    assert [(branch.name, complaint) for branch, complaint in checked[0] if complaint] == []
    assert len(checked[0]) == 9


def test_a_wrong_result_is_refused(checked):
    """The softmax_scale of the reference's call, or a gate, is another one than the kernel's."""
    for branch, _ in checked[0]:
        if branch.gate is not None:
            wrong = replace(branch, others={**branch.others, "softmax_scale": 1.1 * CASE.softmax_scale})
            assert "out" in check_branch(wrong, Wanted())
            other_gate, wrong = replace(branch, gate=1.1 * branch.gate), replace(branch)
            wrong.backward = other_gate.backward
            assert "d q" in check_branch(wrong, Wanted())


@pytest.mark.slow
def test_the_layer_is_held_to_the_branches(checked, device):
    """With the kernels it passes; where two branches are taken for each other, it does not."""
    x = make_inputs(CASE, device.type)
    assert check_layer(x, whole_layer(x, nsa_kernels)(), checked[1]) == ""
    swapped = replace(x, raw={**x.raw, "slc": x.raw["win"], "win": x.raw["slc"]})
    assert check_layer(swapped, whole_layer(swapped, nsa_kernels)(), checked[1]) != ""


def test_made_up_results_have_the_shapes_of_real_ones(checked, device):
    """So that every kernel can be compiled by itself."""
    for (real, _), alone in zip(checked[0], branches_alone(CASE, device.type), strict=True):
        outputs = [b.output if isinstance(b.output, tuple) else (b.output,) for b in (real, alone)]
        if real.function not in ("combine", "gate_deltas", "sum_branches"):  # nothing comes after them
            assert [t.shape for t in outputs[0]] == [t.shape for t in outputs[1]]


def test_a_layer_on_other_leaves(device):
    x = make_inputs(CASE, device.type)
    others = [torch.zeros_like(t) for t in x.leaves]
    assert all(a is b for a, b in zip(x.with_leaves(others).leaves, others, strict=True))


def test_sampled_rows_are_ordered_and_hold_both_ends(device):
    rows = sample_rows(1000, device)
    assert rows[0] == 0
    assert rows[-1] == 999
    assert (rows.diff() > 0).all()
    assert sample_rows(3, device).tolist() == [0, 1, 2]


def test_layer_and_every_gradient_against_the_reference(device):
    """All kernels together, in fp32, where both sides choose the same blocks."""
    x = make_inputs(CASE, device.type)
    results = {}
    grad = torch.randn(CASE.tokens, CASE.num_q_heads, CASE.dim_v, device=device)
    for name, ops, dtype in (
        ("actual", nsa_kernels, torch.float32),
        ("plain", reference, torch.float32),
        ("exact", reference, torch.float64),
    ):
        cast = _cast(x, dtype)
        out = whole_layer(cast, ops)()
        results[name] = out.detach(), *torch.autograd.grad(out, cast.leaves, grad.to(dtype))
    for i, (a, p, e) in enumerate(zip(results["actual"], results["plain"], results["exact"], strict=True)):
        assert_twice(f"result {i}", a, p, e, floor=1e-5)


def test_the_table_of_the_readmes(tmp_path):
    report = Report(tmp_path, {"device": "none"})
    rows = [
        {"step": "compress k", "forward_ms": 0.25, "backward_ms": 0.5},
        {"step": "compress v", "forward_ms": 0.35, "backward_ms": 0.5},
        {"step": "select", "forward_ms": 7.04},
        {"step": "combine", "forward_ms": 1.0},
        {"step": "gate_deltas", "backward_ms": 1.25},
        {"step": "sum_branches", "backward_ms": 1.0},
        {"step": "all", "forward_ms": 120.4, "backward_ms": 250.0, "peak_gib": 3.25},
        {"step": "all, captured", "forward_ms": 90.4, "backward_ms": 12.25},
        {"step": "dense", "forward_ms": 240.8, "backward_ms": 1000.0},
    ]
    report.add(CASE, rows)
    report.add(replace(CASE, tokens=2048), [{"step": "all", "note": "WRONG: out 1.0e+00"}])
    assert report.failed
    lines = (tmp_path / "bench.md").read_text().splitlines()
    assert lines[0] == "| forward / backward, ms | 0k, Hq 4 / Hkv 2, D 32/16 | 2k, Hq 4 / Hkv 2, D 32/16 |"
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[1] for line in lines[2:]}
    assert cells["compress, k and v"] == "0.6 / 1.0"
    assert cells["select"] == "7.0"
    assert cells["combine / deltas and sum of dq"] == "1.0 / 2.2"
    assert cells["**all**"] == "**120 / 250**"
    assert cells["all, captured in CUDA graphs"] == "90.4 / 12.2"
    assert cells["dense / all"] == "2.0x / 4.0x"
    assert all(line.endswith(" |  |") for line in lines[2:])


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
