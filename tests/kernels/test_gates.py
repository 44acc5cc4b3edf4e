"""The gated sum against the fp64 reference: forward, every gradient, strides."""

import pytest
import torch

from kernels.judge import assert_twice
from nsa_kernels import reference
from nsa_kernels.gates.combine import combine


def run(function, tensors, grad_out, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 16), (37, 6, 128), (150, 3, 64), (40, 2, 48)])
def test_forward_and_gradients(tokens, heads, dim, dtype, gate_dtype, device):
    gates = torch.rand(tokens, heads, 3, device=device).to(gate_dtype)
    branches = [torch.randn(tokens, heads, dim, device=device).to(dtype) for _ in range(3)]
    grad_out = torch.randn(tokens, heads, dim, device=device).to(dtype)
    actual = run(combine, (gates, *branches), grad_out)
    plain = run(reference.combine, (gates, *branches), grad_out)
    exact = run(reference.combine, (gates, *branches), grad_out, torch.float64)
    names = ("out", "dgates", "dcmp", "dslc", "dwin")
    for name, a, p, e in zip(names, actual, plain, exact, strict=True):
        assert a.dtype == p.dtype
        assert_twice(name, a, p, e)


def test_strided_inputs_and_expanded_gradients(device):
    fused = torch.randn(3, 4, 30, 16, device=device, requires_grad=True)  # branches of [heads, tokens, dim]
    gates = torch.rand(3, 30, 4, device=device, requires_grad=True)  # [branch, token, head]
    grads = []
    for function in (combine, reference.combine):
        out = function(gates.permute(1, 2, 0), *(x.transpose(0, 1) for x in fused))
        grads.append((out.detach(), *torch.autograd.grad(out.sum(), (fused, gates))))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_no_tokens(device):
    gates, branch = torch.empty(0, 4, 3, device=device), torch.empty(0, 4, 16, device=device, requires_grad=True)
    out = combine(gates, branch, branch, branch)
    assert out.shape == (0, 4, 16)
    assert torch.autograd.grad(out.sum(), branch)[0].shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("gates", "dtype", "remedy"),
    [((5, 2, 2), torch.float32, "reshape or cast"), ((5, 2, 3), torch.float64, "nsa_kernels.reference")],
)
def test_errors_name_the_remedy(gates, dtype, remedy, device):
    branch = torch.zeros(5, 2, 16, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=remedy):
        combine(torch.zeros(gates, device=device), branch, branch, branch)
