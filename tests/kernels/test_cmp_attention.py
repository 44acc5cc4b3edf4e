"""Compressed attention against the fp64 reference: forward, every gradient, packs, masks, empty rows, bits."""

import math

import pytest
import torch

from kernels.judge import assert_twice
from kernels.packs import pack
from kernels.plain import interval_attention
from nsa_kernels import reference
from nsa_kernels.interval.attention import compressed_attention, compressed_attention_backward
from nsa_kernels.interval.parts import tile_ranges

NAMES = ("out", "lse", "dq", "dk", "dv")
# dP - dO . O is nothing but rounding where one key has all the weight: that of fp32 sums over a head dim.
FLOOR = 32 * torch.finfo(torch.float32).eps


def inputs(num_queries, num_keys, group, num_kv_heads, dims, dtype, device, std=1.0):
    q = torch.randn(num_queries, group * num_kv_heads, dims[0], device=device) * std
    k = torch.randn(num_keys, num_kv_heads, dims[0], device=device)
    v = torch.randn(num_keys, num_kv_heads, dims[1], device=device)
    return [x.to(dtype) for x in (q, k, v)]


def run(attend, tensors, begin, end, grad_out, grad_lse, dtype=None):
    """out, lse, dq, dk, dv of `attend`, the inputs cast to `dtype` first."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out, lse = attend(*leaves, begin, end, softmax_scale=leaves[0].shape[-1] ** -0.5)
    seen = (end > begin)[:, None].expand_as(lse)  # -inf takes no gradient
    grads = torch.autograd.grad((out, lse[seen]), leaves, (grad_out.to(out.dtype), grad_lse.to(lse.dtype)[seen]))
    return out.detach(), lse.detach(), *grads


def check(tensors, begin, end):
    device = tensors[0].device
    begin, end = begin.to(device), end.to(device)
    grad_out = torch.randn(*tensors[0].shape[:2], tensors[2].shape[-1], device=device).to(tensors[0].dtype)
    grad_lse = torch.randn(tensors[0].shape[:2], device=device)
    actual = run(compressed_attention, tensors, begin, end, grad_out, grad_lse)
    plain = run(reference.compressed_attention, tensors, begin, end, grad_out, grad_lse)
    # P and dS enter the tensor cores in the input dtype, so gradients are held to PyTorch's own bf16 operations.
    plain = *plain[:2], *run(interval_attention, tensors, begin, end, grad_out, grad_lse)[2:]
    exact = run(reference.compressed_attention, tensors, begin, end, grad_out, grad_lse, torch.float64)
    for name, a, p, e in zip(NAMES, actual, plain, exact, strict=True):
        assert a.dtype == p.dtype
        assert_twice(name, a, p, e, FLOOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("group", "num_kv_heads", "dims"), [(1, 2, (16, 16)), (4, 2, (32, 16)), (6, 1, (48, 32))])
def test_forward_and_gradients(group, num_kv_heads, dims, dtype, device):
    """48 = 32 + 16 is a head dim of two parts; a group of 6 straddles the tiles of rows."""
    p = pack([150], block_len=8, stride=2, slc_block_len=16)  # 72 keys, more than a tile
    check(inputs(160, p.num_blocks, group, num_kv_heads, dims, dtype, device), p.begin, p.end)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)])
def test_head_dims_of_models(dims, device):
    p = pack([120])
    check(inputs(128, p.num_blocks, 2, 1, dims, torch.bfloat16, device), p.begin, p.end)


def gated_gradients(attend, tensors, begin, end, grad_out, gate, dtype=None):
    """dq, dk, dv of gate * out by autograd, the inputs cast to `dtype` first."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out, _ = attend(*leaves, begin, end, softmax_scale=leaves[0].shape[-1] ** -0.5)
    return torch.autograd.grad(out, leaves, grad_out.to(out.dtype) * gate.to(out.dtype)[..., None])


@pytest.mark.parametrize(("group", "num_kv_heads", "dims"), [(1, 2, (16, 16)), (4, 2, (64, 64)), (6, 1, (48, 32))])
def test_backward_of_a_gated_sum(group, num_kv_heads, dims, device):
    """One column of gates of either sign and of 0; delta is one of three columns; packs with rows that see nothing."""
    p = pack([70, 20, 130], slc_block_len=16).to(device)
    tensors = inputs(len(p.begin), p.num_blocks, group, num_kv_heads, dims, torch.bfloat16, device)
    q, k, v = tensors
    grad_out = torch.randn(*q.shape[:2], dims[1], device=device).bfloat16()
    gates = torch.randn(*q.shape[:2], 3, device=device).bfloat16()
    gates[3, 1:] = 0.0
    gate = gates[..., 0]
    out, lse = compressed_attention(q, k, v, p.begin, p.end, softmax_scale=dims[0] ** -0.5)
    deltas = torch.full((*q.shape[:2], 3), math.nan, device=device)
    deltas[..., 1] = (out.float() * grad_out.float()).sum(-1)
    delta = deltas[..., 1].masked_fill_((p.begin == p.end)[:, None], math.nan)  # goes nowhere
    args = grad_out, gate, delta, lse, q, k, v, p.begin, p.end
    actual = compressed_attention_backward(*args, softmax_scale=dims[0] ** -0.5)
    wide = compressed_attention_backward(*args, softmax_scale=dims[0] ** -0.5, kv_dtype=torch.float32)
    plain = gated_gradients(interval_attention, tensors, p.begin, p.end, grad_out, gate)
    exact = gated_gradients(reference.compressed_attention, tensors, p.begin, p.end, grad_out, gate, torch.float64)
    for name, a, w, b, e in zip(NAMES[2:], actual, wide, plain, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert w.dtype == (torch.bfloat16 if name == "dq" else torch.float32)
        assert torch.equal(w.bfloat16(), a), f"{name}: not the same sum before rounding"
        assert_twice(name, a, b, e, FLOOR)
        assert_twice(f"{name} in {w.dtype}", w, b, e, FLOOR)


@pytest.mark.parametrize(("group", "num_kv_heads"), [(1, 2), (4, 1), (16, 1)])
def test_documents_of_several_tiles_of_keys(group, num_kv_heads, device):
    """Head dim 64: on a Hopper GPU the Gluon kernels, whose tiles of 128 keys begin inside a document."""
    p = pack([300, 20, 150], block_len=8, stride=2)
    assert p.num_blocks > 2 * 100
    check(inputs(len(p.begin), p.num_blocks, group, num_kv_heads, (64, 64), torch.bfloat16, device), p.begin, p.end)


@pytest.mark.parametrize("group", [16, 64])
def test_large_groups(group, device):
    p = pack([40], stride=8, slc_block_len=4)
    check(inputs(40, p.num_blocks, group, 1, (16, 16), torch.bfloat16, device), p.begin, p.end)


@pytest.mark.parametrize("num_keys", [1, 63, 64, 65, 130])
def test_numbers_of_keys_around_a_tile(num_keys, device):
    """The last 40 queries of a longer document; the last 20 of them see every key."""
    end = torch.arange(num_keys - 19, num_keys + 21, dtype=torch.int32).clamp(0, num_keys)
    check(inputs(40, num_keys, 3, 1, (16, 16), torch.float32, device), torch.zeros(40, dtype=torch.int32), end)


def test_packed_documents_with_some_too_short_for_a_block(device):
    p = pack([70, 20, 130, 31, 64], slc_block_len=16)
    assert (p.begin == p.end).sum() > 31 + 20 + 31
    check(inputs(len(p.begin), p.num_blocks, 4, 1, (16, 16), torch.bfloat16, device), p.begin, p.end)


def test_a_future_key_changes_nothing(device):
    """The mask is not inverted and not off by one: query t sees block i from token i * d + l - 1 on."""
    p = pack([100]).to(device)
    q, k, v = inputs(128, p.num_blocks, 2, 1, (16, 16), torch.float32, device)
    out, lse = compressed_attention(q, k, v, p.begin, p.end, softmax_scale=0.25)
    k[3], v[3] = 100.0, 1e6  # block 3 is tokens 48 .. 79
    changed, changed_lse = compressed_attention(q, k, v, p.begin, p.end, softmax_scale=0.25)
    assert torch.equal(out[:79], changed[:79])
    assert torch.equal(lse[:79], changed_lse[:79])
    assert (changed[79:100] != out[79:100]).any(-1).all()


def test_rows_that_see_nothing(device):
    p = pack([20, 60]).to(device)
    leaves = [x.requires_grad_() for x in inputs(128, p.num_blocks, 2, 1, (16, 16), torch.bfloat16, device)]
    out, lse = compressed_attention(*leaves, p.begin, p.end, softmax_scale=0.25)
    empty = p.begin == p.end
    assert (out[empty] == 0).all()
    assert (lse[empty] == -math.inf).all()
    # A NaN that arrives for the -inf of such a row stays there.
    grad_lse = torch.zeros_like(lse).masked_fill(empty[:, None], math.nan)
    grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), grad_lse))
    assert (grads[0][empty] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 7), (5, 0), (5, 3)])
def test_no_keys_no_queries_nothing_seen(num_queries, num_keys, device):
    leaves = [x.requires_grad_() for x in inputs(num_queries, num_keys, 2, 1, (16, 16), torch.float32, device)]
    nothing = torch.zeros(num_queries, dtype=torch.int32, device=device)
    out, lse = compressed_attention(*leaves, nothing, nothing, softmax_scale=0.25)
    assert out.shape == (num_queries, 2, 16)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_large_logits_and_a_sink(device):
    """Logits of standard deviation 10, and a first block that takes nearly all the weight: no offset overflows."""
    p = pack([300], stride=4)
    q, k, v = inputs(320, p.num_blocks, 2, 1, (32, 32), torch.bfloat16, device, std=10.0)
    k[0] = 12 * q[:, 0].mean(0) / q[:, 0].mean(0).norm() * 32**0.5
    check([q, k, v], p.begin, p.end)


def test_one_huge_logit(device):
    """An offset taken from one token or one head would overflow here."""
    p = pack([200]).to(device)
    q, k, v = inputs(256, p.num_blocks, 2, 1, (16, 16), torch.float32, device)
    q[150] *= 1e4
    out, lse = compressed_attention(q, k, v, p.begin, p.end, softmax_scale=0.25)
    expected, expected_lse = reference.compressed_attention(q, k, v, p.begin, p.end, softmax_scale=0.25)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-5)


def test_strided_inputs_and_expanded_gradients(device):
    """Heads cut from a fused projection, and the gradient of `out.sum()`, whose strides are all 0."""
    p = pack([64]).to(device)
    fused = torch.randn(64, 8, 48, device=device, requires_grad=True)
    q, k, v = fused[:, :4, :16], fused[: p.num_blocks, 4:8:2, 16:32], fused[: p.num_blocks, 5:8:2, 32:]
    seen = p.begin < p.end
    grads = []
    for attend in (compressed_attention, reference.compressed_attention):
        out, lse = attend(q, k, v, p.begin, p.end, softmax_scale=0.25)
        grads += torch.autograd.grad(out.sum() + lse[seen].sum(), fused)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_strides_that_the_copy_engine_cannot_read(device):
    """Rows of 20 bf16 are 40 bytes apart, not a multiple of 16."""
    p = pack([64]).to(device)
    base = torch.randn(64, 1, 20, device=device).bfloat16()
    q, k, v = base[..., 3:19], base[: p.num_blocks, :, :16], base[: p.num_blocks, :, 4:]
    strided = compressed_attention(q, k, v, p.begin, p.end, softmax_scale=0.25)
    dense = compressed_attention(*(x.contiguous() for x in (q, k, v)), p.begin, p.end, softmax_scale=0.25)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


@pytest.mark.parametrize("group", [1, 16])
def test_bits_do_not_depend_on_where_a_query_lies(group, device):
    """Queries computed alone, as a rank of several would, give the bits that the whole sequence gives."""
    p = pack([350], block_len=16, stride=4, slc_block_len=32).to(device)
    q, k, v = inputs(352, p.num_blocks, group, 1, (16, 16), torch.bfloat16, device)
    whole = compressed_attention(q, k, v, p.begin, p.end, softmax_scale=0.25)
    for first, last in ((0, 64), (233, 240), (320, 352)):
        rows = slice(first, last)
        part = compressed_attention(q[rows], k, v, p.begin[rows], p.end[rows], softmax_scale=0.25)
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))


def test_two_runs_give_the_same_bits(device):
    p = pack([200]).to(device)
    tensors = inputs(256, p.num_blocks, 4, 1, (16, 16), torch.bfloat16, device)
    grad_out, grad_lse = torch.randn(256, 4, 16, device=device).bfloat16(), torch.randn(256, 4, device=device)
    first, second = (run(compressed_attention, tensors, p.begin, p.end, grad_out, grad_lse) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_lse_is_used(device):
    p = pack([100]).to(device)
    seen = p.begin < p.end
    leaves = [x.requires_grad_() for x in inputs(128, p.num_blocks, 2, 1, (16, 16), torch.float32, device)]
    grads = []
    for attend in (compressed_attention, reference.compressed_attention):
        _, lse = attend(*leaves, p.begin, p.end, softmax_scale=0.25)
        grads.append(torch.autograd.grad(lse[seen].sum(), leaves[:2]))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_tile_ranges_worked_example(device):
    """The example of the docstring: four queries that see 0, 1, 2, 3 keys; tiles of keys 0, 1 and 2."""
    end = torch.arange(4, dtype=torch.int32, device=device)
    begin = torch.zeros_like(end)
    assert tile_ranges(begin, end, 3, 2).tolist() == [[1, 3], [4, 4], [2, 3], [4, 4]]


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda a: a.update(k=a["k"][:, :1].repeat(1, 3, 1)), "must divide"),
        (lambda a: a.update(q=a["q"].double(), k=a["k"].double(), v=a["v"].double()), "nsa_kernels.reference"),
        (lambda a: a.update(begin=a["begin"].long()), "dtype=torch.int32"),
        (lambda a: a.update(v=a["v"][..., :15]), "pad it with zeros"),
        (lambda a: a.update(q=a["q"][..., :15], k=a["k"][..., :15]), "pad the head dim"),
        (lambda a: a.update(softmax_scale=0.0), "negate q"),
    ],
)
def test_errors_name_the_remedy(change, remedy, device):
    p = pack([64]).to(device)
    q, k, v = inputs(64, p.num_blocks, 2, 1, (16, 16), torch.float32, device)
    arguments = {"q": q, "k": k, "v": v, "begin": p.begin, "end": p.end, "softmax_scale": 0.25}
    change(arguments)
    with pytest.raises(ValueError, match=remedy):
        compressed_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda a: a.update(grad_out=a["grad_out"].double()), "in its own dtype; cast"),
        (lambda a: a.update(gate=a["gate"][..., None]), "one branch's column"),
        (lambda a: a.update(delta=a["delta"].bfloat16()), "sum delta in fp32"),
        (lambda a: a.update(softmax_lse=a["softmax_lse"].T), "from the forward"),
    ],
)
def test_errors_of_the_backward_name_the_remedy(change, remedy, device):
    p = pack([64]).to(device)
    q, k, v = inputs(64, p.num_blocks, 2, 1, (16, 16), torch.float32, device)
    row = torch.ones(64, 2, device=device)
    arguments = {"grad_out": q, "gate": row, "delta": row, "softmax_lse": row, "q": q, "k": k, "v": v}
    arguments |= {"begin": p.begin, "end": p.end, "softmax_scale": 0.25}
    change(arguments)
    with pytest.raises(ValueError, match=remedy):
        compressed_attention_backward(**arguments)
