"""The reference's explicit gradients against autograd of `gate * forward` in fp64, and the sums around them."""

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference

T, HQ, HKV, DK, DV, BLOCK = 70, 4, 2, 6, 4, 8
SCALE = 0.4


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def signed_gates() -> Tensor:
    """One column of [T, Hq, 3]: of both signs, some of them 0, and not contiguous."""
    gates = torch.randn(T, HQ, 3, dtype=torch.float64)
    gates[::5] = 0.0
    return gates[..., 1]


def interval() -> tuple[Tensor, Tensor]:
    """Windows of 9 over 75 rows of keys; the first 4 queries, and 3 in the middle, see nothing."""
    end = (torch.arange(T, dtype=torch.int32) - 3).clamp(min=0)
    begin = (end - 9).clamp(min=0)
    begin[40:43] = end[40:43]
    begin[43:] = begin[43:].clamp(min=int(begin[42]))
    return begin, end


def expected(out: Tensor, inputs: list[Tensor], gate: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """(grad_out, autograd's gradients of gate * out, delta)"""
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad((gate[..., None] * out * grad_out).sum(), inputs)
    return grad_out, list(grads), (grad_out * out.detach()).sum(-1)


def assert_close(actual, wanted) -> None:
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["compressed_attention", "window_attention"])
def test_intervals(name):
    inputs, bounds = leaves((T, HQ, DK), (75, HKV, DK), (75, HKV, DV)), interval()
    out, lse = getattr(reference, name)(*inputs, *bounds, softmax_scale=SCALE)
    gate = signed_gates()
    grad_out, wanted, delta = expected(out, inputs, gate)
    backward = getattr(reference, f"{name}_backward")
    assert_close(backward(grad_out, gate, delta, lse, *inputs, *bounds, softmax_scale=SCALE), wanted)
    ungated = backward(grad_out * gate[..., None], None, gate * delta, lse, *inputs, *bounds, softmax_scale=SCALE)
    assert_close(ungated, wanted)


def selection() -> tuple[Tensor, Tensor, Tensor]:
    """block_indices, block_table, position: 9 blocks, of which heads hold the last 3 as remote pages of their own."""
    position = torch.arange(T)
    position[-3:] = -1
    own = position // BLOCK
    ids = torch.stack([torch.stack([torch.zeros_like(own), (own - 2 - h).clamp(min=1), own], -1) for h in (0, 1)], 1)
    ids[(ids > own[:, None, None]) | (position < 0)[:, None, None]] = -1
    for row in ids.view(-1, 3):
        distinct = row[row >= 0].unique()
        row[: len(distinct)], row[len(distinct) :] = distinct, -1
    ids[5] = -1  # a query that chose nothing
    local = torch.arange(6).expand(HKV, -1)
    remote = 6 + torch.arange(6).view(HKV, 3)
    return ids.to(torch.int32), torch.cat([local, remote], 1).to(torch.int32), position


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "the parts of two rounds add up"])
def test_selected(parts):
    ids, table, position = selection()
    shapes = [(T, HQ, DK), (48, HKV, DK), (48, HKV, DV), (6, BLOCK, DK), (6, BLOCK, DV)]
    inputs, gate = leaves(*shapes), signed_gates()
    options = {"slc_block_len": BLOCK, "softmax_scale": SCALE}

    def pages(tensors) -> dict[str, Tensor]:
        return dict(zip(("k_remote", "v_remote"), tensors[3:], strict=True))

    out, lse = reference.selected_attention(*inputs[:3], ids, table, position, **pages(inputs), **options)
    grad_out, wanted, delta = expected(out, inputs, gate)
    assert (lse[5] == -torch.inf).all()
    chosen = [ids] if parts == 1 else [ids.masked_fill(ids >= 6, -1), ids.masked_fill(ids < 6, -1)]
    sums = [torch.zeros_like(x) for x in inputs]
    for some in chosen:
        grads = reference.selected_attention_backward(
            grad_out, gate, delta, lse, *inputs[:3], some, table, position, **pages(inputs), **options
        )
        for total, grad in zip(sums, grads, strict=True):
            total += grad
    assert_close(sums, wanted)


def test_deltas_are_the_gradient_of_the_gates():
    gates, *outs = leaves((T, HQ, 3), *[(T, HQ, DV)] * 3)
    grad_out = torch.randn(T, HQ, DV, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(reference.combine(gates, *outs), gates, grad_out)
    assert_close([reference.gate_deltas(grad_out, *outs)], [wanted])


def test_out_is_filled_where_it_lies():
    gates, *outs = (x.detach() for x in leaves((T, HQ, 3), *[(T, HQ, DV)] * 3))
    heads, whole = slice(2, 4), torch.full((T, 6, DV), torch.nan, dtype=torch.float64)
    columns = torch.full((T, 6, 3), torch.nan, dtype=torch.float64)
    for function, tensors, target in (
        (reference.combine, (gates, *outs), whole),
        (reference.sum_branches, outs, whole),
        (reference.gate_deltas, (outs[1], *outs), columns),
    ):
        wanted = function(*tensors)
        given = target[:, 1:5][:, heads]
        assert function(*(x[:, heads] for x in tensors), out=given) is not None
        assert torch.equal(given, wanted[:, heads])
        assert target[:, [0, 1, 2, 5]].isnan().all()
