"""Deltas of the branches and the sum of their gradients against the fp64 reference; results written into views."""

import pytest
import torch

from kernels.judge import assert_twice
from nsa_kernels import reference
from nsa_kernels.gates.combine import combine
from nsa_kernels.gates.deltas import gate_deltas
from nsa_kernels.gates.sums import sum_branches

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rows(count, shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 16), (37, 6, 128), (150, 3, 64), (40, 2, 48)])
def test_deltas(tokens, heads, dim, dtype, device):
    tensors = rows(4, (tokens, heads, dim), dtype, device)
    actual = gate_deltas(*tensors)
    assert actual.dtype == torch.float32
    assert all(actual[..., b].is_contiguous() for b in range(3))
    exact = reference.gate_deltas(*(x.double() for x in tensors))
    assert_twice("deltas", actual, reference.gate_deltas(*tensors), exact)


def test_deltas_are_what_combine_gives_the_gates(device):
    gates = torch.rand(30, 4, 3, device=device, requires_grad=True)
    grad_out, *outs = rows(4, (30, 4, 32), torch.bfloat16, device)
    (wanted,) = torch.autograd.grad(combine(gates, *outs), gates, grad_out)
    assert torch.equal(gate_deltas(grad_out, *outs), wanted)


@pytest.mark.parametrize("wide", [False, True], ids=["one dtype", "slc in fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 16), (37, 6, 192), (40, 2, 48)])
def test_sum(tokens, heads, dim, dtype, wide, device):
    cmp, slc, win = rows(3, (tokens, heads, dim), dtype, device)
    slc = torch.randn_like(slc, dtype=torch.float32) if wide else slc
    actual = sum_branches(cmp, slc, win)
    assert actual.dtype == dtype
    exact = reference.sum_branches(cmp.double(), slc.double(), win.double())
    assert_twice("sum", actual, reference.sum_branches(cmp, slc, win), exact)
    if dtype != torch.float32:
        assert torch.equal(actual, (cmp.float() + slc.float() + win.float()).to(dtype)), "not rounded once"


@pytest.mark.parametrize("function", [gate_deltas, sum_branches, combine])
def test_heads_of_one_group_are_written_where_they_lie(function, device):
    """Results of heads 2 and 3 fill these of a larger tensor; inputs are heads of larger ones, or expanded."""
    gates = torch.rand(3, 25, 6, device=device).permute(1, 2, 0)
    whole = rows(3, (25, 6, 16), torch.bfloat16, device)
    expanded = torch.ones((), dtype=torch.bfloat16, device=device).expand(25, 6, 16)
    arguments = {combine: (gates, *whole), sum_branches: whole, gate_deltas: (expanded, *whole)}[function]
    target = function(*arguments)
    wanted = target[:, 2:4].clone()
    target.fill_(torch.nan)
    given = target[:, 2:4]
    result = function(*(x[:, 2:4] for x in arguments), out=given)
    assert result.data_ptr() == given.data_ptr()
    assert torch.equal(given, wanted)
    assert target[:, [0, 1, 4, 5]].isnan().all()


def test_no_tokens(device):
    empty = torch.empty(0, 4, 16, device=device)
    assert gate_deltas(empty, empty, empty, empty).shape == (0, 4, 3)
    assert sum_branches(empty, empty, empty).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("function", "count", "out", "remedy"),
    [
        (gate_deltas, 4, torch.zeros(5, 2, 3, dtype=torch.bfloat16), "pass such a tensor or view"),
        (sum_branches, 3, torch.zeros(16, 2, 5).permute(2, 1, 0), "pass such a tensor or view"),
    ],
)
def test_errors_name_the_remedy(function, count, out, remedy, device):
    tensors = [torch.zeros(5, 2, 16, device=device) for _ in range(count)]
    with pytest.raises(ValueError, match=remedy):
        function(*tensors, out=out.to(device))
    with pytest.raises(ValueError, match="reshape or cast them"):
        function(*tensors[1:], tensors[0][:4])
    with pytest.raises(ValueError, match="for fp64"):
        function(*tensors[1:], tensors[0].double())
