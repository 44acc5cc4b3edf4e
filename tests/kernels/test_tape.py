"""What a tape repeats, without a GPU: operators of torch, memory that comes and goes, launches of made-up kernels."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from nsa_kernels.common import tape
from nsa_kernels.common.launch import Launch
from nsa_kernels.common.tape import Tapes


@pytest.fixture(autouse=True)
def _a_device(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    monkeypatch.setattr(tape, "driver", SimpleNamespace(active=active))


def _run(grid_x, grid_y, grid_z, stream, function, metadata, data, enter, leave, a, x, y, out, size):
    """As a compiled kernel: of tensors it wants the addresses."""
    addresses = (x if isinstance(x, int) else x.data_ptr() for x in (x, y, out))
    x, y, out = ((ctypes.c_float * size).from_address(address) for address in addresses)
    for i in range(size):
        out[i] = a * x[i] + y[i]


def axpy(a: float, x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = a * x + y, all contiguous fp32, launched as `launch.Kernel` does."""
    launch = Launch(_run, 0, None, (1, 1, 1), (out.numel(),))
    launch(0, (a, x, y, out))
    listener = _get_current_dispatch_mode()
    if listener is not None:
        listener.launched(launch, (a, x, y, out))


@torch.no_grad()
def repeated(body, *draws: tuple[Tensor, ...]) -> tuple[list, list, Tapes]:
    """Results of the tape and of the body for each of the drawn inputs, and the tapes."""
    tapes = Tapes()
    found = [tapes.run(body, list(inputs)) for inputs in draws]
    return found, [body(list(inputs)) for inputs in draws], tapes


def draws(*shapes: tuple[int, ...], number: int = 4) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(number)]


def same(found: list, expected: list) -> bool:
    pairs = [pair for f, e in zip(found, expected, strict=True) for pair in zip(f, e, strict=True)]
    return all(torch.equal(*pair) and pair[0].stride() == pair[1].stride() for pair in pairs)


def test_launches_views_and_operators_are_repeated():
    constant = torch.arange(8.0)
    calls = []

    def body(inputs: list[Tensor]) -> list[Tensor]:
        x, y = inputs
        calls.append(1)
        between, zeros = torch.empty(8), torch.zeros(8)
        axpy(2.0, x[1], constant, between)  # a view of an input, and a constant
        axpy(1.0, between, zeros, zeros)
        out = torch.empty(2, 8)
        axpy(3.0, zeros, y, out[1])
        axpy(1.0, y, between, out[0])
        return [out[1], out, torch.cat([out, x[:1] + 1]).sum(0), x, constant]

    given = draws((2, 8), (8,))
    found, expected, tapes = repeated(body, *given)
    assert same(found, expected)
    assert len(calls) == 2 + len(given)  # run once, recorded once; the others are the expected ones
    assert all(results[3] is inputs[0] for results, inputs in zip(found[2:], given[2:], strict=True))
    assert len(tapes._tapes) == 1


def test_memory_is_let_go_where_the_body_did():
    def body(inputs: list[Tensor]) -> list[Tensor]:
        x, y = inputs
        inputs.clear()
        first = torch.empty(8)
        axpy(1.0, x, y, first)
        del y
        second = torch.empty(8)
        axpy(1.0, first, x, second)
        del first
        third = torch.empty(8)
        axpy(1.0, second, second, third)
        return [third]

    _, _, tapes = repeated(body, *draws((8,), (8,), number=2))
    (recorded,) = tapes._tapes.values()
    names = [type(step).__name__ for step in recorded.steps]
    assert names == ["_Take", "_Launch", "_LetGo", "_Take", "_Launch", "_LetGo", "_Take", "_Launch"]


def test_other_shapes_strides_and_dtypes_are_other_tapes():
    def body(inputs: list[Tensor]) -> list[Tensor]:
        return [inputs[0] * 2]

    tapes = Tapes()
    like = [torch.ones(4, 6), torch.ones(6, 4), torch.ones(6, 4).T, torch.ones(4, 6).double()]
    with torch.no_grad():
        for x in like * 3:
            (found,) = tapes.run(body, [x])
            assert torch.equal(found, x * 2)
    assert len(tapes._tapes) == len(like)


def test_tapes_of_many_shapes_do_not_pile_up():
    tapes = Tapes()
    with torch.no_grad():
        for size in range(1, 200):
            tapes.run(lambda inputs: [inputs[0] + 1], [torch.ones(size)])
    assert len(tapes._tapes) <= 64


@pytest.mark.parametrize(
    "body",
    [lambda xs: [xs[0] * xs[0].sum().item()], lambda xs: [xs[0][xs[0] > 0]], lambda xs: [xs[0].view(torch.int32) + 1]],
    ids=["a number for the host", "a size that depends on data", "another dtype"],
)
def test_what_cannot_be_repeated_is_run(body):
    """A size that depends on data is known to the host; here, on a CPU, it is an operator like others."""
    given = draws((8,), number=5)
    found, expected, _ = repeated(body, *given)
    assert same(found, expected)


@pytest.mark.parametrize("x", [torch.ones(1, 8).expand(4, 8), torch.ones(9)[1:]], ids=["expanded", "not aligned"])
def test_inputs_that_no_copy_is_like(x):
    found, expected, tapes = repeated(lambda inputs: [inputs[0] + 1], (x,), (x,), (x,))
    assert same(found, expected)
    (recorded,) = tapes._tapes.values()
    assert "no copy" in recorded.obstacle


def test_gradients_are_never_taped():
    tapes, x = Tapes(), torch.ones(8, requires_grad=True)
    for _ in range(3):
        (y,) = tapes.run(lambda inputs: [inputs[0] * 3], [x])
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((8,), 3.0))
    assert not tapes._tapes


def test_nothing_is_recorded_while_a_graph_is_captured(monkeypatch):
    """Or the graph would hold the recording's work as well; what was recorded before is repeated into it."""
    tapes, calls = Tapes(), []

    def body(inputs: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [inputs[0] + 1]

    with torch.no_grad():
        for captures in (False, True, True, False, True):
            monkeypatch.setattr(tape, "_is_captured", lambda x, captures=captures: captures)
            (found,) = tapes.run(body, [torch.ones(8)])
            assert torch.equal(found, torch.full((8,), 2.0))
    assert len(calls) == 4  # first, twice into the graph, recorded; then repeated


def test_inputs_may_share_memory():
    """A fused projection's K and V are views of one tensor, wherever they lie in it."""

    def body(inputs: list[Tensor]) -> list[Tensor]:
        k, v = inputs
        out = torch.empty(8)
        axpy(2.0, k[0], v[1], out)
        return [out, k + v]

    def fused(at: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
        return x[:, at : at + 8], x[:, at + 8 : at + 16]

    found, expected, _ = repeated(body, *(fused(at, seed) for seed, at in enumerate((0, 16, 8, 0))))
    assert same(found, expected)
