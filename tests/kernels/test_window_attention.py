"""Window attention against the fp64 reference: forward, every gradient, halos, packs, empty rows, bits."""

import math

import pytest
import torch

from kernels.judge import assert_twice
from kernels.plain import interval_attention
from nsa_kernels import reference
from nsa_kernels.interval.attention import window_attention, window_attention_backward

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def causal_window(doc_lens, window, halo=0):
    """begin, end of a pack of documents whose first `halo` key rows come before the first query."""
    begin, end, start = [], [], 0
    for doc, length in enumerate(doc_lens):
        for t in range(start, start + length):
            earliest = 0 if doc == 0 else start + halo
            begin.append(max(earliest, t + halo + 1 - window))
            end.append(t + halo + 1)
        start += length
    return torch.tensor(begin, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)


def inputs(num_queries, num_keys, group, num_kv_heads, dims, dtype, device, std=1.0):
    q = torch.randn(num_queries, group * num_kv_heads, dims[0], device=device) * std
    k = torch.randn(num_keys, num_kv_heads, dims[0], device=device)
    v = torch.randn(num_keys, num_kv_heads, dims[1], device=device)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def run(attend, tensors, begin, end, grad_out, grad_lse, dtype=None):
    """out, lse, dq, dk, dv of `attend`, the inputs cast to `dtype` first."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out, lse = attend(*leaves, begin, end, softmax_scale=leaves[0].shape[-1] ** -0.5)
    seen = (end > begin)[:, None].expand_as(lse)  # -inf takes no gradient
    grads = torch.autograd.grad((out, lse[seen]), leaves, (grad_out.to(out.dtype), grad_lse.to(lse.dtype)[seen]))
    return out.detach(), lse.detach(), *grads


def check(tensors, begin, end, device):
    begin, end = begin.to(device), end.to(device)
    grad_out = torch.randn(*tensors[0].shape[:2], tensors[2].shape[-1], device=device).to(tensors[0].dtype)
    grad_lse = torch.randn(tensors[0].shape[:2], device=device)
    actual = run(window_attention, tensors, begin, end, grad_out, grad_lse)
    plain = run(reference.window_attention, tensors, begin, end, grad_out, grad_lse)
    plain = *plain[:2], *run(interval_attention, tensors, begin, end, grad_out, grad_lse)[2:]
    exact = run(reference.window_attention, tensors, begin, end, grad_out, grad_lse, torch.float64)
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        assert a.dtype == p.dtype
        assert_twice(name, a, p, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "num_kv_heads", "dims"), [(1, 2, (16, 16)), (4, 2, (32, 16)), (16, 1, (48, 32))])
def test_forward_and_gradients(group, num_kv_heads, dims, dtype, device):
    begin, end = causal_window([150], window=70)
    check(inputs(150, 150, group, num_kv_heads, dims, dtype, device), begin, end, device)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)])
def test_head_dims_of_models(dims, device):
    begin, end = causal_window([80], window=40)
    check(inputs(80, 80, 2, 1, dims, torch.bfloat16, device), begin, end, device)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129])
def test_lengths_around_a_tile(length, device):
    begin, end = causal_window([length], window=64)
    check(inputs(length, length, 3, 1, (16, 16), torch.bfloat16, device), begin, end, device)


def test_keys_begin_before_the_first_query(device):
    begin, end = causal_window([40], window=50, halo=49)
    assert begin[0] == 0
    check(inputs(40, 89, 2, 2, (16, 16), torch.bfloat16, device), begin, end, device)


def test_packed_documents_with_short_ones(device):
    lens = [3, 1, 90, 20]
    begin, end = causal_window(lens, window=32)
    check(inputs(sum(lens), sum(lens), 4, 1, (16, 16), torch.bfloat16, device), begin, end, device)


@pytest.mark.parametrize("dims", [(16, 16), (64, 64)])
def test_rows_that_see_nothing(dims, device):
    begin, end = causal_window([100], window=16)
    end[:5] = begin[:5] = 0
    begin[60:75] = end[60:75] = end[59]
    tensors = inputs(100, 100, 2, 1, dims, torch.bfloat16, device)
    check(tensors, begin, end, device)
    out, lse = window_attention(*tensors, begin.to(device), end.to(device), softmax_scale=0.25)
    empty = (begin == end).to(device)
    assert (out[empty] == 0).all()
    assert (lse[empty] == -math.inf).all()
    (dq,) = torch.autograd.grad(out.sum(), tensors[:1])
    assert (dq[empty] == 0).all()


def test_no_query_sees_anything(device):
    tensors = inputs(20, 20, 1, 1, (16, 16), torch.float32, device)
    nothing = torch.zeros(20, dtype=torch.int32, device=device)
    out, lse = window_attention(*tensors, nothing, nothing, softmax_scale=0.25)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("num_queries", [0, 5])
def test_no_keys_or_no_queries(num_queries, device):
    tensors = inputs(num_queries, 0 if num_queries else 7, 2, 1, (16, 16), torch.float32, device)
    nothing = torch.zeros(num_queries, dtype=torch.int32, device=device)
    out, lse = window_attention(*tensors, nothing, nothing, softmax_scale=0.25)
    assert out.shape == (num_queries, 2, 16)
    assert (lse == -math.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), tensors))


# On a Hopper GPU the second goes another way than the first.
WAYS = [(torch.float32, (16, 16)), (torch.bfloat16, (64, 64))]


@pytest.mark.parametrize(("dtype", "dims"), WAYS)
def test_unseen_rows_may_hold_nan(dtype, dims, device):
    """A halo that no neighbour filled, and rows past the last query."""
    begin, end = causal_window([70], window=30, halo=29)
    begin.clamp_(min=29)
    q, k, v = (x.detach() for x in inputs(70, 120, 2, 1, dims, dtype, device))
    clean = window_attention(q, k, v, begin.to(device), end.to(device), softmax_scale=0.25)
    for x in (k, v):
        x[:29] = x[99:] = math.nan
    dirty = window_attention(q, k, v, begin.to(device), end.to(device), softmax_scale=0.25)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = window_attention(*leaves, begin.to(device), end.to(device), softmax_scale=0.25)
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad[29:70].isfinite().all()


def test_strided_inputs_and_expanded_gradients(device):
    """Heads cut from a fused projection, and the gradient of `out.sum()`, whose strides are all 0."""
    begin, end = (t.to(device) for t in causal_window([70], window=20))
    fused = torch.randn(70, 8, 48, device=device, requires_grad=True)
    q, k, v = fused[:, :4, :16], fused[:, 4:8:2, 16:32], fused[:, 5:8:2, 32:]
    out, lse = window_attention(q, k, v, begin, end, softmax_scale=0.25)
    (actual,) = torch.autograd.grad(out.sum() + lse.sum(), fused)
    out, lse = reference.window_attention(q, k, v, begin, end, softmax_scale=0.25)
    (expected,) = torch.autograd.grad(out.sum() + lse.sum(), fused)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_large_logits_and_a_sink(device):
    """Logits of standard deviation 10, and a first token that takes nearly all the weight."""
    q, k, v = (x.detach() for x in inputs(130, 130, 2, 1, (32, 32), torch.bfloat16, device, std=10.0))
    k[0] = 12 * q[:, 0].mean(0) / q[:, 0].mean(0).norm() * 32**0.5
    begin, end = causal_window([130], window=128)
    check([x.requires_grad_() for x in (q, k, v)], begin, end, device)


@pytest.mark.parametrize("dims", [(16, 16), (64, 64)])
@pytest.mark.parametrize("group", [1, 4])
def test_bits_do_not_depend_on_where_a_query_lies(group, dims, device):
    """Queries 128 .. 200 alone, their keys a halo of 64 and themselves, give the bits that the whole sequence gives."""
    begin, end = causal_window([200], window=64)
    q, k, v = (x.detach() for x in inputs(200, 200, group, 1, dims, torch.bfloat16, device))
    whole = window_attention(q, k, v, begin.to(device), end.to(device), softmax_scale=0.25)
    local = (begin[128:] - 64).to(device), (end[128:] - 64).to(device)
    part = window_attention(q[128:], k[64:], v[64:], *local, softmax_scale=0.25)
    shifted = window_attention(q[133:], k[64:], v[64:], *(t[5:] for t in local), softmax_scale=0.25)
    for a, b, c in zip(whole, part, shifted, strict=True):
        assert torch.equal(a[128:], b)
        assert torch.equal(a[133:], c)


@pytest.mark.parametrize("dim", [16, 64])
def test_two_runs_give_the_same_bits(dim, device):
    begin, end = (t.to(device) for t in causal_window([100], window=30))
    tensors = inputs(100, 100, 4, 1, (dim, dim), torch.bfloat16, device)
    grad_out, grad_lse = torch.randn(100, 4, dim, device=device).bfloat16(), torch.randn(100, 4, device=device)
    first, second = (run(window_attention, tensors, begin, end, grad_out, grad_lse) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_lse_is_used(device):
    begin, end = (t.to(device) for t in causal_window([40], window=9))
    tensors = inputs(40, 40, 2, 1, (16, 16), torch.float32, device)
    _, lse = window_attention(*tensors, begin, end, softmax_scale=0.25)
    _, expected = reference.window_attention(*tensors, begin, end, softmax_scale=0.25)
    actual_grads = torch.autograd.grad(lse.sum(), tensors)
    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected.sum(), tensors[:2]), strict=False):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    assert (actual_grads[2] == 0).all()


def gated(attend, gate):
    def through(*args, **options):
        out, lse = attend(*args, **options)
        return gate.to(out.dtype)[..., None] * out, lse

    return through


def upstream(tensors, gates_dtype, device):
    """grad_out [T, Hq, Dv] strided, and one column of gates [T, Hq, 3]: of both signs, some of them 0."""
    num_tokens, num_heads, _ = tensors[0].shape
    grad_out = torch.randn(num_heads, num_tokens, tensors[2].shape[2], device=device).to(tensors[0].dtype)
    gates = torch.randn(num_tokens, num_heads, 3, device=device).to(gates_dtype)
    gates[::5] = 0
    return grad_out.transpose(0, 1), gates[..., 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "num_kv_heads", "dims"), [(1, 2, (16, 16)), (4, 2, (48, 32)), (16, 1, (16, 16)), (2, 1, (64, 64))]
)
def test_gradients_through_a_gate(group, num_kv_heads, dims, dtype, device):
    """From the common gradient, a gate, delta and softmax_lse: as autograd through gate * out; some see nothing."""
    begin, end = causal_window([130], window=50)
    begin[60:75] = end[60:75] = end[59]
    begin[75:] = begin[75:].clamp(min=60)
    begin, end = begin.to(device), end.to(device)
    tensors = inputs(130, 130, group, num_kv_heads, dims, dtype, device)
    grad_out, gate = upstream(tensors, dtype, device)
    no_grad_lse = torch.zeros(gate.shape, device=device)
    exact = run(gated(reference.window_attention, gate), tensors, begin, end, grad_out, no_grad_lse, torch.float64)[2:]
    plain = run(gated(interval_attention, gate), tensors, begin, end, grad_out, no_grad_lse)[2:]
    with torch.no_grad():
        out, lse = window_attention(*tensors, begin, end, softmax_scale=dims[0] ** -0.5)
        deltas = torch.stack([(grad_out.float() * out.float()).sum(-1)] * 3, -1)
        args = grad_out, gate, deltas[..., 1], lse, *tensors, begin, end
        actual = window_attention_backward(*args, softmax_scale=dims[0] ** -0.5)
        wide = window_attention_backward(*args, softmax_scale=dims[0] ** -0.5, kv_dtype=torch.float32)
    for name, a, w, p, e, x in zip(("dq", "dk", "dv"), actual, wide, plain, exact, tensors, strict=True):
        assert a.dtype == x.dtype
        assert w.dtype == (x.dtype if name == "dq" else torch.float32)
        assert torch.equal(w.to(x.dtype), a), f"{name}: not the same sum before rounding"
        assert_twice(name, a, p, e)
        assert_twice(f"{name} in {w.dtype}", w, p, e)


def test_a_gate_of_ones_and_of_none_give_the_same_bits(device):
    begin, end = (t.to(device) for t in causal_window([70], window=20))
    tensors = [x.detach() for x in inputs(70, 70, 2, 1, (16, 16), torch.bfloat16, device)]
    grad_out, _ = upstream(tensors, torch.bfloat16, device)
    out, lse = window_attention(*tensors, begin, end, softmax_scale=0.25)
    delta = (grad_out.float() * out.float()).sum(-1)
    ones, none = (
        window_attention_backward(grad_out, gate, delta, lse, *tensors, begin, end, softmax_scale=0.25)
        for gate in (torch.ones_like(lse), None)
    )
    assert all(torch.equal(a, b) for a, b in zip(ones, none, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("grad_out", torch.zeros(8, 2, 15), "reshape or cast it"),
        ("gate", torch.zeros(8, 2, 3), r"gates\[\.\.\., b\]"),
        ("delta", torch.zeros(8, 2, dtype=torch.float64), "a column of gate_deltas"),
    ],
)
def test_backward_errors_name_the_remedy(name, value, remedy, device):
    begin, end = (t.to(device) for t in causal_window([8], window=4))
    tensors = [x.detach() for x in inputs(8, 8, 2, 1, (16, 16), torch.float32, device)]
    rows = torch.zeros(8, 2, device=device)
    arguments = {"grad_out": torch.zeros_like(tensors[0]), "gate": None, "delta": rows, "softmax_lse": rows}
    arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=remedy):
        window_attention_backward(
            **arguments, **dict(zip("qkv", tensors, strict=True)), begin=begin, end=end, softmax_scale=0.25
        )


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda a: a.update(k=a["k"][:, :1].repeat(1, 3, 1)), "must divide"),
        (lambda a: a.update(q=a["q"].double(), k=a["k"].double(), v=a["v"].double()), "nsa_kernels.reference"),
        (lambda a: a.update(begin=a["begin"].long()), r"begin\.to\(torch\.int32\)"),
        (lambda a: a.update(v=a["v"][..., :15]), "pad the head dim"),
        (lambda a: a.update(softmax_scale=0.0), "negate q"),
    ],
)
def test_errors_name_the_remedy(change, remedy, device):
    begin, end = (t.to(device) for t in causal_window([8], window=4))
    q, k, v = inputs(8, 8, 2, 1, (16, 16), torch.float32, device)
    arguments = {"q": q, "k": k, "v": v, "begin": begin, "end": end, "softmax_scale": 0.25}
    change(arguments)
    with pytest.raises(ValueError, match=remedy):
        window_attention(**arguments)
