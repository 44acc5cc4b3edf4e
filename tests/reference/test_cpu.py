"""`nsa_kernels.cpu` against the reference: results and every gradient, in fp64 and fp32, and of parts of a whole."""

import pytest
import torch
from torch import Tensor

from nsa_kernels import cpu, reference

HEADS = [(4, 2, 16, 8), (2, 2, 8, 8), (4, 1, 8, 24)]  # Hq, Hkv, Dk, Dv
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
BLOCK = 16


def assert_same(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def interval_inputs(heads: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """300 queries with windows of 50; the first 20 see nothing."""
    num_q_heads, num_kv_heads, dim_k, dim_v = heads
    torch.manual_seed(0)
    q, k = torch.randn(300, num_q_heads, dim_k), torch.randn(310, num_kv_heads, dim_k)
    v = torch.randn(310, num_kv_heads, dim_v)
    t = torch.arange(300, dtype=torch.int32)
    end = (t - 19).clamp(min=0)
    return [x.to(dtype) for x in (q, k, v)], [(end - 50).clamp(min=0), end]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["window_attention", "compressed_attention"])
def test_intervals(name, heads, dtype):
    inputs, interval = interval_inputs(heads, dtype)

    def everything(ops) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = getattr(ops, name)(*leaves, *interval, softmax_scale=0.3)
        upstream = torch.linspace(-1, 1, out.shape[-1], dtype=dtype).expand_as(out)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]

    got = everything(cpu)
    assert_same(got, everything(reference), dtype)
    assert (got[0][:20] == 0).all()
    assert (got[1][:20] == -torch.inf).all()


def selected_inputs(heads: tuple[int, int, int, int], dtype: torch.dtype, remote: bool) -> tuple[list, list]:
    """20 blocks, of which 12 are here and, if `remote`, the others fetched; one query has chosen nothing."""
    num_q_heads, num_kv_heads, dim_k, dim_v = heads
    torch.manual_seed(0)
    num_blocks, num_local = 20, 12 if remote else 20
    position = torch.arange(num_blocks * BLOCK)
    scores = torch.rand(len(position), num_kv_heads, num_blocks)
    block = torch.arange(num_blocks)
    visible = block <= (position // BLOCK)[:, None, None]
    ids = scores.masked_fill(~visible, -1).topk(5).indices.sort(-1).values
    ids = ids.masked_fill(ids > (position // BLOCK)[:, None, None], num_blocks).sort(-1).values
    ids = ids.masked_fill(ids == num_blocks, -1).to(torch.int32)
    ids[3] = -1
    fetched = num_blocks - num_local
    table = torch.stack([block + (block >= num_local) * head * fetched for head in range(num_kv_heads)]).to(torch.int32)
    tensors = [
        torch.randn(len(position), num_q_heads, dim_k),
        torch.randn(num_local * BLOCK, num_kv_heads, dim_k),
        torch.randn(num_local * BLOCK, num_kv_heads, dim_v),
    ]
    if remote:
        tensors += [torch.randn(fetched * num_kv_heads, BLOCK, dim) for dim in (dim_k, dim_v)]
    return [x.to(dtype) for x in tensors], [ids, table, position]


def selected(ops, tensors: list[Tensor], indices: list[Tensor]) -> tuple[Tensor, Tensor]:
    pages = dict(zip(("k_remote", "v_remote"), tensors[3:], strict=False))
    return ops.selected_attention(*tensors[:3], *indices, **pages, slc_block_len=BLOCK, softmax_scale=0.3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("remote", [False, True])
def test_selected(remote, heads, dtype):
    inputs, indices = selected_inputs(heads, dtype, remote)

    def everything(ops) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = selected(ops, leaves, indices)
        upstream = torch.linspace(-1, 1, out.shape[-1], dtype=dtype).expand_as(out)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]

    assert_same(everything(cpu), everything(reference), dtype)


def backward_inputs(out: Tensor, lse: Tensor) -> list[Tensor]:
    """grad_out, gate, delta, softmax_lse of a whole of which `out` and `lse` are a part; some gates and rows are 0."""
    gate, grad_out = torch.randn_like(lse).to(out.dtype), torch.randn_like(out)
    gate[::3], grad_out[::7] = 0.0, 0.0
    delta = (grad_out.to(lse.dtype) * (out.to(lse.dtype) * 0.7)).sum(-1)
    return [grad_out, gate, delta, lse + 0.3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["window_attention", "compressed_attention"])
def test_interval_gradients_of_a_part(name, heads, dtype):
    inputs, interval = interval_inputs(heads, dtype)
    whole = backward_inputs(*getattr(reference, name)(*inputs, *interval, softmax_scale=0.3))
    got, expected = (
        getattr(ops, f"{name}_backward")(*whole, *inputs, *interval, softmax_scale=0.3) for ops in (cpu, reference)
    )
    assert_same(got, expected, dtype)


@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("name", ["window_attention", "compressed_attention"])
def test_interval_gradients_in_fp32(name, ops):
    """dk and dv of bf16 inputs before they are rounded; dq as always."""
    inputs, interval = interval_inputs(HEADS[0], torch.bfloat16)
    whole = backward_inputs(*getattr(ops, name)(*inputs, *interval, softmax_scale=0.3))
    backward = getattr(ops, f"{name}_backward")
    rounded = backward(*whole, *inputs, *interval, softmax_scale=0.3)
    wide = backward(*whole, *inputs, *interval, softmax_scale=0.3, kv_dtype=torch.float32)
    assert [x.dtype for x in wide] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(x.bfloat16(), y) for x, y in zip(wide, rounded, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(wide, rounded, strict=True))


@pytest.mark.parametrize("remote", [False, True])
def test_selected_gradients_of_a_part(remote):
    """The merged out and softmax_lse come from more blocks than these."""
    inputs, indices = selected_inputs(HEADS[0], torch.float64, remote)
    whole = backward_inputs(*selected(reference, inputs, indices))
    pages = dict(zip(("k_remote", "v_remote"), inputs[3:], strict=False))
    got, expected = (
        ops.selected_attention_backward(*whole, *inputs[:3], *indices, **pages, slc_block_len=BLOCK, softmax_scale=0.3)
        for ops in (cpu, reference)
    )
    present = [i for i, grad in enumerate(expected) if grad is not None]
    assert present == [i for i, grad in enumerate(got) if grad is not None]
    assert_same([got[i] for i in present], [expected[i] for i in present], torch.float64)


@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_gradients_in_a_dtype_of_ones_own(ops):
    inputs, indices = selected_inputs(HEADS[0], torch.bfloat16, remote=False)
    whole = backward_inputs(*selected(reference, inputs, indices))

    def gradients(**dtype) -> list[Tensor]:
        options = {"slc_block_len": BLOCK, "softmax_scale": 0.3, **dtype}
        return ops.selected_attention_backward(*whole, *inputs, *indices, **options)[:3]

    for narrow, wide in zip(gradients(), gradients(dtype=torch.float32), strict=True):
        assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(narrow, wide.bfloat16())
