"""Compression against the fp64 reference: the mean and the MLP, forward and every gradient, blocks anywhere."""

import pytest
import torch

from kernels import plain
from kernels.judge import assert_twice
from kernels.pace import SLOW_WITHOUT_A_GPU
from nsa_kernels import reference
from nsa_kernels.phi.compress import compress_mean, compress_mlp, compress_mlp_pair

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
REGULAR = list(range(0, 81, 8))  # blocks of 16 rows, 8 apart
SEGMENTS = [3, 11, 19, 100, 108, 116]  # two segments that do not begin at a multiple of the stride
TANGLED = [40, 0, 8, 40, 21, 150, 16]  # in no order, at uneven distances, one of them twice


def mlp_inputs(num_rows, num_heads, block_len, head_dim, width, dtype, device):
    x = torch.randn(num_rows, num_heads, head_dim, device=device)
    pos_emb = torch.randn(num_heads, block_len, head_dim, device=device)
    w1 = torch.randn(num_heads, block_len * head_dim, width, device=device) / (block_len * head_dim) ** 0.5
    w2 = torch.randn(num_heads, width, head_dim, device=device) / width**0.5
    return [t.to(dtype) for t in (x, pos_emb, w1, w2)]


def run(phi, tensors, grad_y, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = phi(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))


def check(kernel, expected, tensors, num_blocks, plain_phi=None):
    """`expected` in fp64 is what is right, `plain_phi` or else `expected` in the dtype of x what is held to."""
    x = tensors[0]
    grad_y = torch.randn(num_blocks, *x.shape[1:], device=x.device).to(x.dtype)
    actual = run(kernel, tensors, grad_y)
    yardstick = run(plain_phi or expected, tensors, grad_y)
    exact = run(expected, tensors, grad_y, torch.float64)
    for name, a, p, e in zip(("y", "dx", "dpos_emb", "dw1", "dw2"), actual, yardstick, exact, strict=False):
        assert a.dtype == x.dtype
        assert_twice(name, a, p, e)


def check_mlp(block_rows, tensors):
    block_rows = torch.tensor(block_rows, device=tensors[0].device)
    check(
        lambda x, *params: compress_mlp(x, block_rows, *params),
        lambda x, *params: reference.compress_mlp(x, block_rows, *params),
        tensors,
        len(block_rows),
        lambda x, *params: plain.compress_mlp(x, block_rows, *params),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_rows", [REGULAR, TANGLED])
def test_mean(block_rows, dtype, device):
    block_rows = torch.tensor(block_rows, device=device)
    x = torch.randn(180, 3, 24, device=device).to(dtype)
    check(
        lambda x: compress_mean(x, block_rows, 16),
        lambda x: reference.compress_mean(x, block_rows, 16),
        [x],
        len(block_rows),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_of_each_dtype(dtype, device):
    check_mlp(REGULAR, mlp_inputs(100, 2, 16, 16, 32, dtype, device))


@pytest.mark.parametrize(
    ("head_dim", "width"),
    [(48, 16), (16, 20), (32, 130)],
    ids=["a head dim of three sixteens", "a width that fills no tile", "a width of two tiles"],
)
def test_mlp_of_odd_sizes(head_dim, width, device):
    check_mlp([0, 8, 16, 30], mlp_inputs(50, 1, 16, head_dim, width, torch.bfloat16, device))


@pytest.mark.parametrize("block_rows", [SEGMENTS, TANGLED, [5]], ids=["segments", "tangled", "one block"])
def test_mlp_of_blocks_anywhere(block_rows, device):
    """Rows that no block covers take a gradient of 0, rows that several cover the sum."""
    check_mlp(block_rows, mlp_inputs(170, 2, 16, 16, 16, torch.float32, device))


def test_more_blocks_than_a_tile(device):
    check_mlp(list(range(0, 4 * 67, 4)), mlp_inputs(280, 1, 8, 16, 16, torch.float16, device))


def test_mean_worked_example(device):
    """Blocks of 4 rows, 2 apart, over rows 0 .. 5: means 1.5 and 3.5; rows 2 and 3 are in both."""
    x = torch.arange(6.0, device=device)[:, None, None].expand(6, 1, 16).contiguous().requires_grad_()
    y = compress_mean(x, torch.tensor([0, 2], device=device), 4)
    assert y[:, 0, 0].tolist() == [1.5, 3.5]
    (dx,) = torch.autograd.grad(y, x, torch.tensor([4.0, 8.0], device=device)[:, None, None].expand(2, 1, 16))
    assert dx[:, 0, 0].tolist() == [1, 1, 3, 3, 2, 2]


@pytest.mark.parametrize("num_rows", [0, 20])
def test_no_blocks(num_rows, device):
    """Documents shorter than one block have none."""
    tensors = [t.requires_grad_() for t in mlp_inputs(num_rows, 2, 32, 16, 16, torch.float32, device)]
    none = torch.empty(0, dtype=torch.int32, device=device)
    for y in (compress_mlp(tensors[0], none, *tensors[1:]), compress_mean(tensors[0], none, 32)):
        assert y.shape == (0, 2, 16)
        (dx,) = torch.autograd.grad(y.sum(), tensors[:1])
        assert dx.shape == (num_rows, 2, 16)
        assert (dx == 0).all()


def test_strided_input_and_expanded_gradient(device):
    fused = torch.randn(60, 4, 40, device=device, requires_grad=True)
    x = fused[:, 1::2, 8:24]
    _, *params = mlp_inputs(60, 2, 16, 16, 16, torch.float32, device)
    block_rows = torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=device)
    for module_phi, phi in (
        (lambda: compress_mlp(x, block_rows, *params), lambda: reference.compress_mlp(x, block_rows, *params)),
        (lambda: compress_mean(x, block_rows, 16), lambda: reference.compress_mean(x, block_rows, 16)),
    ):
        grads = [torch.autograd.grad(f().sum(), fused)[0] for f in (module_phi, phi)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_bits_do_not_depend_on_the_other_blocks(device):
    """A rank that compresses its own blocks gets the bits of one that compresses them all."""
    x, *params = mlp_inputs(100, 1, 16, 32, 48, torch.bfloat16, device)
    block_rows = torch.tensor(REGULAR, device=device)
    whole, whole_mean = compress_mlp(x, block_rows, *params), compress_mean(x, block_rows, 16)
    mine = block_rows[5:9] - 37
    assert torch.equal(whole[5:9], compress_mlp(x[37:], mine, *params))
    assert torch.equal(whole_mean[5:9], compress_mean(x[37:], mine, 16))


@pytest.mark.parametrize(
    "block_rows",
    [
        pytest.param(REGULAR, id="regular", marks=SLOW_WITHOUT_A_GPU),
        pytest.param(TANGLED, id="tangled"),
        pytest.param([], id="no block"),
    ],
)
@pytest.mark.parametrize(
    "width", [pytest.param(20, id="equal"), pytest.param(16, id="of another width", marks=SLOW_WITHOUT_A_GPU)]
)
def test_a_pair_has_the_bits_of_each_alone(block_rows, width, device):
    """In one launch where both are alike, else one after the other; the second's gradient of y is expanded."""
    pair = [mlp_inputs(170, 3, 16, 16, w, torch.bfloat16, device) for w in (20, width)]
    block_rows = torch.tensor(block_rows, dtype=torch.int32, device=device)
    grad = torch.randn(len(block_rows), 3, 16, device=device).bfloat16()
    grads = (grad, grad[:, :1].expand_as(grad))
    leaves = [[t.requires_grad_() for t in tensors] for tensors in pair]
    alone = [compress_mlp(x, block_rows, *params) for x, *params in leaves]
    parts = []

    def noted(part, body, inputs):
        parts.append(part)
        return body(inputs)

    together = compress_mlp_pair(leaves[0][0], leaves[1][0], block_rows, leaves[0][1:], leaves[1][1:], run=noted)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    of_each = [g for y, of, d in zip(alone, leaves, grads, strict=True) for g in torch.autograd.grad(y, of, d)]
    of_both = torch.autograd.grad(together, [*leaves[0], *leaves[1]], grads)
    for a, b in zip(of_each, of_both, strict=True):
        assert torch.equal(a, b)
    launches = 1 if width == 20 else 2
    assert parts == ["phi"] * launches + ["phi backward"] * launches


def test_two_runs_give_the_same_bits(device):
    tensors = mlp_inputs(170, 1, 16, 16, 16, torch.bfloat16, device)
    block_rows = torch.tensor(TANGLED, device=device)
    grad_y = torch.randn(len(TANGLED), 1, 16, device=device).bfloat16()
    first, second = (run(lambda x, *p: compress_mlp(x, block_rows, *p), tensors, grad_y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parameters_of_another_dtype_get_gradients_of_theirs(device):
    x, *params = mlp_inputs(40, 1, 16, 16, 16, torch.float32, device)
    params = [p.requires_grad_() for p in params]
    y = compress_mlp(x.bfloat16(), torch.tensor([0, 8], device=device), *params)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), params))


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda a: a.update(x=a["x"].double()), "nsa_kernels.reference"),
        (lambda a: a.update(w1=a["w1"][:, 1:]), "expand a shared one over the heads"),
        (lambda a: a.update(x=a["x"][..., :8], pos_emb=a["pos_emb"][..., :8]), "an MLP for each head"),
    ],
)
def test_errors_name_the_remedy(change, remedy, device):
    x, pos_emb, w1, w2 = mlp_inputs(40, 1, 16, 16, 16, torch.float32, device)
    arguments = {"x": x, "pos_emb": pos_emb, "w1": w1, "w2": w2, "block_rows": torch.tensor([0], device=device)}
    change(arguments)
    with pytest.raises(ValueError, match=remedy):
        compress_mlp(**arguments)
