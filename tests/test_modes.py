"""`nsa_attention` gives what its docstring says in every mode of torch, and refuses what it would have to bend."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cases import SMALL, make_inputs, run
from nsa_dist import BranchKV, ShardPlan, nsa_attention
from nsa_kernels import cpu, reference

LENGTHS = [37, 29]
CU = [0, 37, 66]


def inputs_of(dtype=torch.float32):
    inputs = make_inputs(66)
    for phi in (inputs.phi_k, inputs.phi_v):
        phi.to(dtype)
    return [x.detach().to(dtype).requires_grad_() for x in inputs.leaves()], inputs


def attend(leaves, inputs, **options):
    return nsa_attention(
        leaves[0], BranchKV(*leaves[1:7]), leaves[7], SMALL,
        **{"compress_k": inputs.phi_k, "compress_v": inputs.phi_v, "cu_seqlens": torch.tensor(CU), **options},
        return_block_indices=True,
    )  # fmt: skip


def trained(leaves, inputs, **options):
    """Output, chosen blocks, and every gradient, phi's parameters' among them."""
    out, ids = attend(leaves, inputs, **options)
    grads = torch.autograd.grad(out, [*leaves, *inputs.parameters()], inputs.weight.to(out.dtype))
    return [out.detach(), ids, *grads]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MODES = {
    "autocast to bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to fp16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomaly detection": torch.autograd.detect_anomaly,
    "saved tensors elsewhere": lambda: torch.autograd.graph.save_on_cpu(pin_memory=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_modes_change_nothing(mode, dtype):
    leaves, inputs = inputs_of(dtype)
    fresh = ShardPlan(tuple(CU), 1, 16, "contiguous")  # nothing derived from it yet
    wanted = trained(leaves, inputs)
    shards = [fresh.shard(x.detach(), 0).requires_grad_() for x in leaves]
    with MODES[mode]():
        found = trained(leaves, inputs, cu_seqlens=CU)
        out, _ = attend(shards, inputs, plan=fresh, cu_seqlens=None)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(fresh.unshard([out]), wanted[0])


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("cp_plan", [ShardPlan.zigzag, ShardPlan.contiguous])
def test_training_after_inference_of_the_same_lengths(first, cp_plan):
    """Index tensors are kept with the plan: inference must not leave any behind that autograd cannot save."""
    leaves, inputs = inputs_of()
    plan = cp_plan([0, 48, 66], 1, 16)
    shards = [plan.shard(x.detach(), 0).requires_grad_() for x in leaves]
    weight = plan.shard(inputs.weight.float(), 0)
    for options in ({"cu_seqlens": [0, 11, 66]}, {"plan": plan, "cu_seqlens": None}):
        tensors = shards if "plan" in options else leaves
        with first():
            before, _ = attend(tensors, inputs, **options)
        out, _ = attend(tensors, inputs, **options)
        assert torch.equal(before, out)
        out.backward(weight if "plan" in options else inputs.weight.float())
    assert plan.positions(0).is_inference() is False


def test_an_activation_checkpoint_around_it():
    leaves, inputs = inputs_of()
    wanted = trained(leaves, inputs)
    out = checkpoint(lambda *x: attend(x, inputs)[0], *leaves, use_reentrant=False)
    found = torch.autograd.grad(out, [*leaves, *inputs.parameters()], inputs.weight.float())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted[2:], strict=True))


@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_operators_alone_under_autocast(ops):
    """The parts of the attention, called by themselves: forward and backward, inside the mode."""
    x, w = torch.randn(20, 2, 16), [torch.randn(2, *s) / 8 for s in [(8, 16), (128, 16), (16, 16)]]
    rows = torch.tensor([0, 4, 12], dtype=torch.int32)
    q, ends = torch.randn(3, 4, 16), torch.tensor([1, 2, 3], dtype=torch.int32)
    begin = torch.zeros_like(ends)

    def results():
        leaves = [t.clone().requires_grad_() for t in (x, *w)]
        y = ops.compress_mlp(leaves[0], rows, *leaves[1:])
        out, lse = ops.compressed_attention(q, y, y, begin, ends, softmax_scale=0.25)
        ids = ops.select_blocks(
            q, y.detach(), lse.detach(), begin, ends, ends, begin, softmax_scale=0.25, cmp_block_len=8, cmp_stride=4,
            slc_block_len=8, num_slc_blocks=1, num_init_blocks=0, num_local_blocks=1,
        )  # fmt: skip
        return [y.detach(), out.detach(), lse.detach(), ids, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    wanted = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- What a phi may return ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: torch.cat([y, y[:1]]),
        lambda y: y[:-1],
        lambda y: y[:, :1],
        lambda y: y[..., :-1],
        lambda y: y.flatten(1),
        lambda y: y.long(),
        lambda y: y.tolist(),
        lambda y: None,
    ],
    ids=["a block more", "a block less", "a head less", "narrow", "flat", "integers", "a list", "nothing"],
)
@pytest.mark.parametrize("name", ["compress_k", "compress_v"])
def test_a_phi_that_returns_something_else(name, wrong):
    leaves, inputs = inputs_of()
    remedy = rf"{name} returned .*must return a floating-point \(14, 2, 8\).*return \[M, Hkv, D\]"
    with pytest.raises(ValueError, match=remedy):
        attend(leaves, inputs, **{name: lambda blocks, start: wrong(blocks.mean(1))})


def test_a_phi_in_another_dtype_is_rounded_to_that_of_its_input():
    leaves, inputs = inputs_of(torch.bfloat16)
    wide = attend(leaves, inputs, compress_k=lambda blocks, start: blocks.float().mean(1))
    narrow = attend(leaves, inputs, compress_k=lambda blocks, start: blocks.float().mean(1).bfloat16())
    assert wide[0].dtype == torch.bfloat16
    assert torch.equal(wide[0], narrow[0])


# --- What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        torch.tensor([0.0, 37.9, 66.0]),
        [0, 37.0, 66],
        torch.tensor([False, True]),
        [0, True, 66],
        torch.tensor([[0, 37, 66]]),
        torch.tensor(66),
        66,
        "066",
        [0, None, 66],
    ],
)
def test_cu_seqlens_are_integers_in_one_row(cu_seqlens):
    leaves, inputs = inputs_of()
    for refuse in (
        lambda: attend(leaves, inputs, cu_seqlens=cu_seqlens),
        lambda: ShardPlan.zigzag(cu_seqlens, 2, 16),
        lambda: attend(leaves, inputs, cu_seqlens=cu_seqlens, plan=ShardPlan.zigzag([0, 66], 1, 11)),
    ):
        with pytest.raises(ValueError, match=r"must be integers in one row.*never rounded; pass"):
            refuse()


@pytest.mark.parametrize("cu_seqlens", [CU, tuple(CU), np.array(CU), torch.tensor(CU, dtype=torch.int32)])
def test_cu_seqlens_of_any_integers(cu_seqlens):
    assert ShardPlan.zigzag(cu_seqlens, 2, 16).cu_seqlens == tuple(CU)
    leaves, inputs = inputs_of()
    assert torch.equal(attend(leaves, inputs, cu_seqlens=cu_seqlens)[0], attend(leaves, inputs)[0])


@pytest.mark.parametrize("sizes", [(2.0, 16), (2, 16.0), (True, 16), ("2", 16), (0, 16), (2, 0)])
def test_sizes_of_a_plan_are_integers(sizes):
    with pytest.raises(ValueError, match="must be integers of at least 1"):
        ShardPlan.zigzag(CU, *sizes)


@pytest.mark.parametrize("which", range(1, 7))
def test_one_dtype(which):
    leaves, inputs = inputs_of()
    leaves[which] = leaves[which].detach().bfloat16()
    with pytest.raises(ValueError, match=r"kv\.\w+ is torch.bfloat16 .*q and kv of one dtype.*pass kv\.\w+\.to\(q\)"):
        attend(leaves, inputs)


def test_gates_may_be_wider():
    leaves, inputs = inputs_of(torch.bfloat16)
    leaves[7] = leaves[7].detach().float().requires_grad_()
    out, _ = attend(leaves, inputs)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), leaves[7])[0].dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_mean_nothing(scale):
    leaves, inputs = inputs_of()
    with pytest.raises(ValueError, match=r"must be positive and finite.*negate q instead"):
        attend(leaves, inputs, softmax_scale=scale)


def test_a_batch_dimension():
    leaves, inputs = inputs_of()
    with pytest.raises(ValueError, match="without a batch dim; flatten"):
        attend([x.detach()[None] for x in leaves], inputs)


def test_integers():
    leaves, inputs = inputs_of()
    with pytest.raises(ValueError, match="must be floating-point"):
        attend([x.detach().long() for x in leaves], inputs)


def test_the_same_in_a_second_mode():
    """A run of fp64 under inference mode is the run of training."""
    inputs = make_inputs(66)
    wanted = run(inputs, SMALL, LENGTHS)[0]
    with torch.inference_mode():
        found, _ = attend([x.detach() for x in inputs.leaves()], inputs)
    assert torch.equal(found, wanted)
