"""NaN, infinity and huge numbers in padding, or in another document, reach no token of a document, nor a gradient."""

from functools import cache

import pytest
import torch

import nsa_kernels
from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.compress import CompressMLP
from nsa_kernels import cpu, reference

NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates", "grad_out")
CFG = NSAConfig(8, 4, 16, 3, 1, 1, 20)
BOUNDS = [0, 37, 58]  # two documents, each with a tail of padding
PLAN = ShardPlan.contiguous(BOUNDS, 1, CFG.slc_block_len)
POSITION = PLAN.positions(0)
PADDING, OTHER = POSITION < 0, POSITION.ge(BOUNDS[1])
PLACES = {"padding": PADDING, "the other document": OTHER}
OPS = {"triton": nsa_kernels, "cpu": cpu, "reference": reference}


def attend(ops, dtype, wild: dict[str, float], where: torch.Tensor, device) -> dict[str, torch.Tensor]:
    """Output and gradients of the first document's tokens, with `wild` numbers at `where` of some tensors."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim = 2, 1, 16
    shapes = [(heads, dim), *[(kv_heads, dim)] * 6, (heads, 3), (heads, dim)]
    tensors = {}
    for name, shape in zip(NAMES, shapes, strict=True):
        drawn = torch.randn(len(POSITION), *shape, generator=generator).sigmoid()
        drawn[where] = wild.get(name, 0.5)
        tensors[name] = drawn.to(device, dtype)
    leaves = [x.requires_grad_() for name, x in tensors.items() if name != "grad_out"]
    phis = [CompressMLP(kv_heads, dim, CFG.cmp_block_len, device=device, dtype=dtype) for _ in range(2)]
    for phi in phis:
        for parameter in phi.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    out = nsa_attention(
        leaves[0], BranchKV(*leaves[1:7]), leaves[7], CFG, compress_k=phis[0], compress_v=phis[1], plan=PLAN, ops=ops
    )
    grads = torch.autograd.grad(out, leaves, tensors["grad_out"])
    mine = ~PADDING & ~OTHER
    return {"out": out.detach()[mine], **{f"d{name}": g[mine] for name, g in zip(NAMES, grads, strict=False)}}


@cache
def tame(ops, place: str, device) -> dict[str, torch.Tensor]:
    return attend(OPS[ops], torch.float32, {}, PLACES[place], device)


def check(ops: str, wild: dict[str, float], place: str, device) -> None:
    device = torch.device("cpu") if ops == "cpu" else device
    for name, found in attend(OPS[ops], torch.float32, wild, PLACES[place], device).items():
        # Chunks with wild numbers are taken query by query on a CPU: the same sums in another order.
        torch.testing.assert_close(
            found, tame(ops, place, device)[name], rtol=2e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def in_triton(*arguments, always: bool):
    """A case that takes triton's interpreter seconds: if not `always`, for `make test-all` and for GPUs."""
    slow = not always and not torch.cuda.is_available()
    return pytest.param("triton", *arguments, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    "number",
    [float("nan"), *(pytest.param(number, marks=pytest.mark.slow) for number in (float("-inf"), 3e38))],
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ops", ["cpu", "reference"])
def test_one_tensor(ops, name, place, number):
    check(ops, {name: number}, place, torch.device("cpu"))


@pytest.mark.parametrize(("ops", "name"), [in_triton(name, always=name in ("q", "v_cmp")) for name in NAMES])
def test_one_tensor_through_triton(ops, name, device):
    """Alone, where nothing else that is NaN covers a mask that is missing."""
    check(ops, {name: float("nan")}, "the other document", device)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ops", ["cpu", "reference"])
def test_all_tensors(ops, place, number):
    check(ops, dict.fromkeys(NAMES, number), place, torch.device("cpu"))


@pytest.mark.parametrize(
    ("ops", "place", "number"),
    [in_triton(place, x, always=x != x) for place in PLACES for x in (float("nan"), float("inf"))],
)
def test_all_tensors_through_triton(ops, place, number, device):
    check(ops, dict.fromkeys(NAMES, number), place, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["padding", "the other document"])
@pytest.mark.parametrize(("heads", "dim_k", "dim_v"), [(16, 128, 128), (8, 64, 64), (16, 192, 128), (1, 128, 128)])
def test_at_real_sizes(heads, dim_k, dim_v, place, number, device):
    """Kernels for Hopper, and plain ones for wide keys and single query heads: the same bits whatever others hold."""
    cfg, bounds = NSAConfig(), [0, 1500, 2700, 4001]
    plan = ShardPlan.contiguous(bounds, 1, cfg.slc_block_len)
    position = plan.positions(0)
    middle = (position >= bounds[1]) & (position < bounds[2])
    where = ((position < 0) if place == "padding" else (position >= 0) & ~middle).to(device)
    mine = (middle if place == "the other document" else position >= 0).to(device)
    phis = [CompressMLP(1, dim, cfg.cmp_block_len, device=device, dtype=torch.bfloat16) for dim in (dim_k, dim_v)]
    shapes = [(heads, dim_k), *[(1, dim_k), (1, dim_v)] * 3, (heads, 3), (heads, dim_v)]
    drawn = [torch.randn(len(position), *shape, device=device).bfloat16() for shape in shapes]

    def run(filling: float) -> list[torch.Tensor]:
        *leaves, upstream = (x.masked_fill(where[:, None, None], filling) for x in drawn)
        leaves = [x.requires_grad_() for x in leaves]
        kv, options = BranchKV(*leaves[1:7]), {"compress_k": phis[0], "compress_v": phis[1], "plan": plan}
        out = nsa_attention(leaves[0], kv, leaves[7], cfg, **options)
        return [y.detach()[mine] for y in (out, *torch.autograd.grad(out, leaves, upstream))]

    for name, found, tame in zip(("out", *NAMES), run(number), run(0.5), strict=False):
        assert found.isfinite().all(), name
        assert torch.equal(found, tame), name


@pytest.mark.parametrize("ops", OPS)
def test_a_documents_own_nan_is_not_hidden(ops, device):
    """What is seen comes through: a query with NaN among its keys has NaN for an output."""
    device = torch.device("cpu") if ops == "cpu" else device
    where = torch.zeros(len(POSITION), dtype=torch.bool)
    where[10] = True
    for name in ("v_cmp", "v_slc") if ops == "triton" else ("k_win", "v_win", "v_cmp", "v_slc"):
        found = attend(OPS[ops], torch.float32, {name: float("nan")}, where, device)["out"]
        assert found[10:14].isnan().any(-1).all() if name != "v_cmp" else found[11:14].isnan().any(-1).all(), name
        if ops != "triton":  # whose tiles of selected attention keep documents apart, not the tokens of one
            assert found[:4].isfinite().all(), name
