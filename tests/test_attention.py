"""What `nsa_attention` refuses, and what it promises a caller on one device."""

import pytest
import torch

from cases import SMALL, make_inputs, run
from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.cp.layout import rank_layout
from nsa_dist.operators import default_ops
from nsa_kernels import cpu, reference


def call(num_tokens=40, **changes):
    inputs = make_inputs(num_tokens)
    arguments = {"q": inputs.q, "kv": inputs.kv, "gates": inputs.gates, "cfg": SMALL, **changes}
    return nsa_attention(
        arguments.pop("q"), arguments.pop("kv"), arguments.pop("gates"), arguments.pop("cfg"), **arguments
    )


def kv(**changes):
    return make_inputs(40).kv._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"kv": kv(v_win=torch.zeros(40, 1, 8))}, r"kv\.v_win has shape \(40, 1, 8\).*must be \(40, 2, 8\)"),
        ({"kv": kv(k_slc=torch.zeros(39, 2, 8))}, r"kv\.k_slc"),
        ({"q": torch.zeros(40, 3, 8), "gates": torch.zeros(40, 3, 3)}, "the kv heads must divide them"),
        ({"gates": torch.zeros(40, 4, 2)}, r"must be \(40, 4, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 41])}, r"cu_seqlens\[-1\] says 41"),
        ({"cu_seqlens": torch.tensor([1, 40])}, "must start at 0"),
        ({"plan": ShardPlan.zigzag([0, 40], 2, 16)}, "build the plan with cp_size=1"),
        ({"plan": ShardPlan.zigzag([0, 40], 1, 16)}, "shard with plan.shard"),
        ({"plan": ShardPlan.contiguous([0, 40], 1, 8)}, "build the plan with block_len=16"),
        (
            {"plan": ShardPlan.contiguous([0, 40], 1, 8), "cu_seqlens": torch.tensor([0, 20, 40])},
            "build the plan from this cu_seqlens",
        ),
    ],
)
def test_bad_input_names_the_remedy(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        call(**changes)


def test_a_plan_of_one_rank_is_the_same_function():
    inputs = make_inputs(48)
    plan = ShardPlan.zigzag([0, 48], 1, 16)
    for a, b in zip(run(inputs, SMALL, [48])[2], run(inputs, SMALL, [48], plan, 0)[2], strict=True):
        assert torch.equal(a, b)


def test_any_callable_compresses():
    inputs = make_inputs(70)
    starts = []

    def mean(blocks, block_start):
        starts.append(block_start)
        return blocks.mean(1)

    cu = torch.tensor([0, 33, 70])
    out = nsa_attention(inputs.q, inputs.kv, inputs.gates, SMALL, compress_k=mean, compress_v=mean, cu_seqlens=cu)
    torch.testing.assert_close(out, nsa_attention(inputs.q, inputs.kv, inputs.gates, SMALL, cu_seqlens=cu))
    assert starts[0].tolist() == [*range(0, 26, 4), *range(0, 30, 4)]


def test_phis_run_together_unless_a_hook_hangs_on_one(monkeypatch):
    inputs, calls = make_inputs(70), []

    def pair(*arguments, of=reference.compress_mlp_pair):
        calls.append("pair")
        return of(*arguments)

    monkeypatch.setattr(reference, "compress_mlp_pair", pair)
    together = run(inputs, SMALL, [70])
    inputs.phi_k.register_forward_pre_hook(lambda *_: calls.append("hook"))
    apart = run(inputs, SMALL, [70])
    assert calls == ["pair", "hook"]
    assert torch.equal(together[0], apart[0])
    for a, b in zip(together[2] + together[3], apart[2] + apart[3], strict=True):
        assert torch.equal(a, b)


def test_compress_mlp_takes_blocks_or_rows():
    inputs = make_inputs(60)
    by_rows = nsa_attention(inputs.q, inputs.kv, inputs.gates, SMALL, compress_k=inputs.phi_k)
    by_blocks = nsa_attention(
        inputs.q, inputs.kv, inputs.gates, SMALL, compress_k=lambda blocks, start: inputs.phi_k(blocks, start)
    )
    torch.testing.assert_close(by_rows, by_blocks)


def test_one_pair_for_three_branches():
    inputs = make_inputs(60)
    k, v = inputs.kv[:2]
    out = nsa_attention(inputs.q, BranchKV(k, v, k, v, k, v), inputs.gates, SMALL)
    grad_k, grad_v = torch.autograd.grad(out.sum(), (k, v))
    assert grad_k.ne(0).any(-1).all()
    assert grad_v.ne(0).any(-1).all()


@pytest.mark.parametrize("phi", ["mlp", "mean"])
def test_gradients_are_those_of_autograd_through_the_branches(phi):
    """The backward that is written out against autograd's through each branch and the gated sum."""
    num_tokens, heads = 96, {"softmax_scale": 8**-0.5}
    inputs = make_inputs(num_tokens)
    q, kv, gates = inputs.q, inputs.kv, inputs.gates
    compress = (inputs.phi_k, inputs.phi_v) if phi == "mlp" else (None, None)
    parameters = inputs.parameters() if phi == "mlp" else []
    layout = rank_layout(ShardPlan.contiguous([0, num_tokens], 1, 16), SMALL, 0, q.device)
    out, ids = nsa_attention(
        q, kv, gates, SMALL, compress_k=compress[0], compress_v=compress[1], return_block_indices=True
    )

    def rows(x):
        return reference.gather_blocks(x, layout.cmp_rows, SMALL.cmp_block_len)

    k_cmp, v_cmp = (
        rows(x).mean(1) if f is None else f(rows(x), layout.cmp_block_start)
        for f, x in zip(compress, (kv.k_cmp, kv.v_cmp), strict=True)
    )
    table = torch.arange(6, dtype=torch.int32).expand(2, -1)
    composed = reference.combine(
        gates,
        reference.compressed_attention(q, k_cmp, v_cmp, layout.cmp_begin, layout.cmp_end, **heads)[0],
        reference.selected_attention(q, kv.k_slc, kv.v_slc, ids, table, layout.position, slc_block_len=16, **heads)[0],
        reference.window_attention(q, kv.k_win, kv.v_win, layout.win_begin, layout.win_end, **heads)[0],
    )
    torch.testing.assert_close(out, composed, rtol=1e-12, atol=1e-12)
    leaves = [*inputs.leaves(), *parameters]
    found, expected = (torch.autograd.grad((y * inputs.weight).sum(), leaves) for y in (out, composed))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_second_backward_needs_retain_graph():
    """Saved tensors are freed as backward goes on, unless the graph is to be kept."""
    inputs = make_inputs(40)
    loss = nsa_attention(inputs.q, inputs.kv, inputs.gates, SMALL).sum()
    first, again = (torch.autograd.grad(loss, inputs.q, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs.q)


def test_block_indices_are_global_and_ascending():
    lengths = [40, 1, 100]
    inputs = make_inputs(sum(lengths))
    _, ids, *_ = run(inputs, SMALL, lengths)
    assert ids.dtype == torch.int32
    assert ids.shape == (141, 2, SMALL.num_slc_blocks)
    first = torch.tensor([0, 3, 4]).repeat_interleave(torch.tensor(lengths))  # 40 tokens are 3 blocks of 16
    own = first + torch.cat([torch.arange(length) // 16 for length in lengths])
    for t in range(len(ids)):
        for row in ids[t]:
            chosen = row[row >= 0]
            assert chosen.diff().gt(0).all()
            assert row[len(chosen) :].eq(-1).all()
            assert chosen[0] == first[t]
            assert chosen[-1] == own[t]
            assert len(chosen) == min(SMALL.num_slc_blocks, own[t] - first[t] + 1)


def test_the_cpu_takes_aten_and_fp64_the_reference():
    assert default_ops(torch.zeros(1)) is cpu
    assert default_ops(torch.zeros(1, dtype=torch.float64)) is reference


def test_dense_when_everything_is_selected():
    """With every block selected and the other gates shut, NSA is causal attention."""
    inputs = make_inputs(100)
    gates = torch.zeros(100, 4, 3, dtype=torch.float64)
    gates[..., 1] = 1
    out = nsa_attention(inputs.q, inputs.kv, gates, NSAConfig(8, 4, 16, 64, 1, 2, 20))
    q, k, v = (x.detach().transpose(0, 1)[None] for x in (inputs.q, inputs.kv.k_slc, inputs.kv.v_slc))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense[0].transpose(0, 1))
