"""The reference against the naive implementation, its gradients against finite differences, and its invariants."""

import math

import pytest
import torch

import naive
from cases import PAPER, SMALL, make_inputs, run
from nsa_dist import BranchKV, NSAConfig, nsa_attention
from nsa_kernels import reference
from nsa_kernels.reference import chunks as reference_chunks

LENGTHS = {
    "one token": [1],
    "no compressed block": [7],
    "exactly one": [8],
    "one document": [83],
    "packed": [1, 31, 8, 33, 16, 9],
}


def naive_run(inputs, cfg, lengths):
    leaves = [x.detach().requires_grad_() for x in inputs.leaves()]
    phis = [
        lambda block, g, phi=phi: naive.mlp_block(block, *(p[g] for p in phi.parameters()))
        for phi in (inputs.phi_k, inputs.phi_v)
    ]
    scale = inputs.q.shape[-1] ** -0.5
    out, ids = naive.attention(leaves[0], BranchKV(*leaves[1:7]), leaves[7], cfg, *phis, lengths, scale)
    grads = torch.autograd.grad((out * inputs.weight).sum(), [*leaves, *inputs.parameters()], materialize_grads=True)
    return out.detach(), ids, list(grads[:8]), list(grads[8:])


@pytest.mark.parametrize(("heads", "kv_heads", "dim_k", "dim_v"), [(4, 2, 8, 8), (2, 2, 6, 4), (4, 1, 4, 6)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_agrees_with_naive(lengths, heads, kv_heads, dim_k, dim_v):
    inputs = make_inputs(sum(lengths), heads, kv_heads, dim_k, dim_v)
    out, ids, grads, param_grads = run(inputs, SMALL, lengths)
    expected = naive_run(inputs, SMALL, lengths)
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(out, expected[0], rtol=1e-11, atol=1e-11)
    for name, a, b in zip(["q", *BranchKV._fields, "gates"], grads, expected[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"d{name}: {m}")
    for a, b in zip(param_grads, expected[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "cfg",
    [
        NSAConfig(8, 4, 12, 3, 0, 1, 5),
        NSAConfig(4, 4, 8, 4, 1, 1, 1),
        NSAConfig(12, 4, 8, 3, 2, 1, 64),
        NSAConfig(8, 8, 32, 6, 1, 2, 7),
    ],
    ids=["l' not a power of two", "blocks do not overlap", "l > l', window of all", "n beyond the visible"],
)
def test_other_sizes(cfg):
    lengths = [45, 3, 26]
    inputs = make_inputs(sum(lengths), 4, 2, cfg=cfg, seed=3)
    out, ids, *_ = run(inputs, cfg, lengths)
    expected = naive_run(inputs, cfg, lengths)
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(out, expected[0], rtol=1e-11, atol=1e-11)


def test_overlap_weights_of_the_paper():
    assert reference.overlap_weights(32, 16, 64) == {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}
    assert reference.overlap_weights(32, 32, 64) == {0: 1, 1: 1}
    assert sum(reference.overlap_weights(64, 16, 64).values()) == 16


def test_gradcheck():
    lengths = [19, 9]
    cfg = NSAConfig(8, 4, 8, 2, 1, 1, 6)
    inputs = make_inputs(sum(lengths), 2, 1, 3, 2, cfg)
    cu = torch.tensor([0, 19, 28], dtype=torch.int32)
    _, chosen, *_ = run(inputs, cfg, lengths)

    def attend(q, gates, pos_emb, w1, w2, *kv):
        def phi(blocks, block_start):
            rows = torch.arange(len(blocks), dtype=torch.int32) * 8
            return reference.compress_mlp(blocks.flatten(0, 1), rows, pos_emb, w1, w2)

        out, ids = nsa_attention(q, BranchKV(*kv), gates, cfg, compress_k=phi, cu_seqlens=cu, return_block_indices=True)
        assert torch.equal(ids, chosen), "a finite difference moved the choice; take another seed"
        return out

    args = [inputs.q, inputs.gates, *inputs.phi_k.parameters(), *inputs.kv]
    assert torch.autograd.gradcheck(attend, args, eps=1e-6, atol=1e-6)


def test_gradient_of_lse_and_merge():
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    zero = torch.zeros(5, dtype=torch.int32)
    middle, end = torch.tensor([0, 0, 1, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)

    def merged(q, k, v):
        left = reference.window_attention(q, k, v, zero, middle, softmax_scale=0.7)
        right = reference.window_attention(q, k, v, middle, end, softmax_scale=0.7)
        return reference.merge(*left, *right)

    whole = reference.window_attention(q, k, v, zero, end, softmax_scale=0.7)
    for part, expected in zip(merged(q, k, v), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)
    assert merged(q, k, v)[1][0].eq(-math.inf).all()
    assert merged(q, k, v)[0][0].eq(0).all()
    assert torch.autograd.gradcheck(lambda *x: merged(*x)[1][1:].sum() + merged(*x)[0].square().sum(), (q, k, v))


@pytest.mark.parametrize("cfg", [SMALL, PAPER], ids=["small", "paper"])
def test_the_future_changes_nothing(cfg):
    length = 5 * cfg.slc_block_len + 7
    inputs = make_inputs(length, cfg=cfg)
    out, ids, *_ = run(inputs, cfg, [length])
    for cut in (1, cfg.cmp_block_len, 2 * cfg.slc_block_len - 1, 3 * cfg.slc_block_len, length - 1):
        noisy = make_inputs(length, cfg=cfg)
        with torch.no_grad():
            for x in noisy.leaves():
                x[cut:] = 50 * torch.randn(x[cut:].shape, dtype=x.dtype)
        got, got_ids, *_ = run(noisy, cfg, [length])
        assert torch.equal(got[:cut], out[:cut])
        assert torch.equal(got_ids[:cut], ids[:cut])
        assert not torch.equal(got[cut:], out[cut:])


def test_documents_never_see_each_other():
    lengths = [40, 1, 70]
    inputs = make_inputs(sum(lengths))
    out, *_ = run(inputs, SMALL, lengths)
    with torch.no_grad():
        for x in inputs.leaves():
            x[40:41] = 99.0
    again, *_ = run(inputs, SMALL, lengths)
    assert torch.equal(again[:40], out[:40])
    assert torch.equal(again[41:], out[41:])


def test_large_logits_and_a_sink():
    inputs = make_inputs(90)
    with torch.no_grad():
        inputs.q.mul_(1e3)
        for x in inputs.kv:
            x[0] *= 100
    out, _, grads, _ = run(inputs, SMALL, [90])
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_memory_is_bounded_by_chunks(monkeypatch):
    inputs = make_inputs(300, cfg=PAPER)
    whole = run(inputs, PAPER, [300])
    monkeypatch.setattr(reference_chunks, "MAX_SCORES", 1000)
    chunked = run(inputs, PAPER, [300])
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(chunked[2], whole[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_near(dtype):
    inputs = make_inputs(150, dim_k=16, dim_v=16)
    cast = [x.detach().to(dtype) for x in inputs.leaves()]
    out, ids = nsa_attention(cast[0], BranchKV(*cast[1:7]), cast[7], SMALL, return_block_indices=True)
    cast = [x.double() for x in cast]
    exact, exact_ids = nsa_attention(cast[0], BranchKV(*cast[1:7]), cast[7], SMALL, return_block_indices=True)
    assert out.dtype == dtype
    same = (ids == exact_ids).all(-1).all(-1)
    assert same.float().mean() > 0.95
    error = (out.double() - exact)[same].norm() / exact[same].norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6}[dtype]
