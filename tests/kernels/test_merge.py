"""Merging of partial attention against the fp64 reference, and against attention over all keys at once."""

import math

import pytest
import torch

from kernels.judge import assert_twice
from nsa_kernels import reference
from nsa_kernels.gates.merge import merge


def partials(tokens, heads, dim, dtype, device):
    """Two partial results: some rows saw no key on one side, some on neither."""
    out_a, out_b = torch.randn(2, tokens, heads, dim, device=device).to(dtype)
    lse_a, lse_b = 3 * torch.randn(2, tokens, heads, device=device)
    out_a[::5], lse_a[::5] = 0.0, -math.inf
    out_b[::3], lse_b[::3] = 0.0, -math.inf
    return out_a, lse_a, out_b, lse_b


def run(function, tensors, grad_out, grad_lse, dtype=None):
    """out, lse and the four gradients, where any key was seen: elsewhere lse has none."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    seen = lse > -math.inf
    loss = (out * grad_out.to(out.dtype)).to(lse.dtype)[seen].sum() + (lse[seen] * grad_lse.to(lse.dtype)[seen]).sum()
    grads = torch.autograd.grad(loss, leaves)
    return out.detach(), lse.detach(), *(g[seen] for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(2, 1, 16), (61, 6, 128), (40, 2, 48)])
def test_forward_and_gradients(tokens, heads, dim, dtype, device):
    tensors = partials(tokens, heads, dim, dtype, device)
    grad_out = torch.randn(tokens, heads, dim, device=device).to(dtype)
    grad_lse = torch.randn(tokens, heads, device=device)
    actual = run(merge, tensors, grad_out, grad_lse)
    plain = run(reference.merge, tensors, grad_out, grad_lse)
    exact = run(reference.merge, tensors, grad_out, grad_lse, torch.float64)
    names = ("out", "lse", "dout_a", "dlse_a", "dout_b", "dlse_b")
    for name, a, p, e in zip(names, actual, plain, exact, strict=True):
        assert a.dtype == p.dtype
        assert_twice(name, a, p, e)


def test_rows_that_saw_no_key_have_no_gradient(device):
    leaves = [x.requires_grad_() for x in partials(30, 2, 16, torch.float32, device)]
    out, lse = merge(*leaves)
    nothing = torch.arange(30, device=device) % 15 == 0
    assert (out[nothing] == 0).all()
    assert (lse[nothing] == -math.inf).all()
    for grad in torch.autograd.grad((out.sum(), lse.sum()), leaves, (None, None)):
        assert grad.isfinite().all()
        assert (grad[nothing] == 0).all()


def test_halves_make_the_whole(device):
    """Attention over keys 0 .. 40 and over keys 40 .. 100, merged, is attention over all."""
    q, k, v = (torch.randn(20, heads, 16, device=device, requires_grad=True) for heads in (4, 2, 2))
    k, v = (x.repeat(5, 1, 1) + torch.randn(100, 2, 16, device=device) for x in (k, v))
    bounds = [torch.full((20,), row, dtype=torch.int32, device=device) for row in (0, 40, 100)]
    first = reference.window_attention(q, k, v, bounds[0], bounds[1], softmax_scale=0.25)
    second = reference.window_attention(q, k, v, bounds[1], bounds[2], softmax_scale=0.25)
    whole = reference.window_attention(q, k, v, bounds[0], bounds[2], softmax_scale=0.25)
    for a, b in zip(merge(*first, *second), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_expanded_gradients(device):
    fused = torch.randn(2, 3, 20, 16, device=device, requires_grad=True)
    lse = torch.randn(2, 3, 20, device=device, requires_grad=True)
    grads = []
    for function in (merge, reference.merge):
        out, merged = function(fused[0].transpose(0, 1), lse[0].T, fused[1].transpose(0, 1), lse[1].T)
        grads.append((out.detach(), merged.detach(), *torch.autograd.grad(out.sum() + merged.sum(), (fused, lse))))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({1: torch.zeros(5, 3)}, "reshape them"),
        ({2: torch.zeros(5, 2, 16, dtype=torch.float16)}, "nsa_kernels.reference"),
        ({1: torch.zeros(5, 2, dtype=torch.float64)}, "as the attention kernels return it"),
    ],
)
def test_errors_name_the_remedy(change, remedy):
    arguments = [torch.zeros(5, 2, 16), torch.zeros(5, 2), torch.zeros(5, 2, 16), torch.zeros(5, 2)]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=remedy):
        merge(*arguments)
