"""Every public function of every implementation takes every tensor in any strides: forward and all gradients."""

import pytest
import torch
from torch import Tensor

import nsa_kernels
from kernels.operators import operators
from nsa_kernels import cpu, reference

NAMES = sorted(operators())


def transposed(x: Tensor) -> Tensor:
    """The first two dims change places in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def tokens_last(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def every_second(x: Tensor) -> Tensor:
    return torch.stack([x, x.flip(-1)], -1).flatten(-2)[..., ::2]


def offset(x: Tensor) -> Tensor:
    """An address that is no multiple of 16 bytes."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def column(x: Tensor) -> Tensor:
    """One of several, as `gates[..., b]` is."""
    return torch.stack([x, x.flip(0), x], -1)[..., 0]


def one_for_all_tokens(x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.is_floating_point() else x


def one_for_all_heads(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x) if x.is_floating_point() and x.dim() > 1 else x


def one_number_for_a_row(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x) if x.is_floating_point() and x.dim() > 2 else x


LAYOUTS = [
    transposed, tokens_last, every_second, offset, column, one_for_all_tokens, one_for_all_heads, one_number_for_a_row,
]  # fmt: skip
EXPANDED = LAYOUTS[-3:]  # not of softmax_lse, which is that of its row's scores


def laid_out(tensors: dict[str, Tensor], turn: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Each tensor in another layout; after len(LAYOUTS) turns every one has been in all of them."""
    cast = (x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in tensors.values())
    layouts = [LAYOUTS[(turn + i) % len(LAYOUTS)] for i in range(len(tensors))]
    return {
        name: x if name in ("lse", "softmax_lse") and layout in EXPANDED else layout(x)
        for name, x, layout in zip(tensors, cast, layouts, strict=True)
    }


CASES = [
    pytest.param(nsa_kernels, torch.float32, id="triton"),
    pytest.param(cpu, torch.float32, id="cpu"),
    pytest.param(cpu, torch.bfloat16, id="cpu in bf16"),
    pytest.param(reference, torch.float32, id="reference"),
]
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 2e-5}, torch.bfloat16: {"rtol": 3e-2, "atol": 6e-2}}


def turns():
    """Every implementation in every turn; of what takes minutes in triton's interpreter `make test` takes a third."""
    for case in CASES:
        ops, dtype = case.values
        for turn in range(len(LAYOUTS)):
            slow = ops is nsa_kernels and turn % 3 and not torch.cuda.is_available()
            yield pytest.param(ops, dtype, turn, id=f"{case.id}-{turn}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("ops", "dtype", "turn"), turns())
@pytest.mark.parametrize("name", NAMES)
def test_strides(name, ops, dtype, turn, device):
    operator = operators()[name]
    given = laid_out(operator.tensors, turn, dtype, torch.device("cpu") if ops is cpu else device)
    # softmax_lse and delta are fp32 whatever the dtype
    statistics = {n: x.float() for n, x in given.items() if n in ("lse", "softmax_lse", "delta", "lse_a", "lse_b")}
    given = {**given, **{n: given[n] if given[n].dtype == torch.float32 else x for n, x in statistics.items()}}
    exact = {n: x.double().contiguous() if x.is_floating_point() else x.contiguous() for n, x in given.items()}
    expected = operator.results(reference, exact)
    before = {n: x.clone() for n, x in given.items()}
    actual = operator.results(ops, given)
    for i, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        if mine is None:  # no remote pages, no gradients of them
            assert theirs is None
        elif mine.is_floating_point():
            torch.testing.assert_close(
                mine.double(), theirs.double(), **TOLERANCE[dtype], msg=lambda m, i=i: f"result {i}: {m}"
            )
        else:
            assert torch.equal(mine, theirs)
    assert all(torch.equal(x, before[n]) for n, x in given.items()), "an argument was written to"
