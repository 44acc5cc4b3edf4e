"""The twice rule: a kernel may be at most twice as far from fp64 as plain PyTorch in the same dtype is."""

import torch
from torch import Tensor


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_twice(name: str, actual: Tensor, plain: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    """`exact` is the fp64 reference, `plain` the reference in the kernel's dtype, `actual` the kernel.

    Both the root mean square and the largest error are held. `floor`, relative to the root mean square or the largest
    element of `exact`, covers results that plain PyTorch happens to get exactly right.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN"
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: infinities in other places than the reference"
    exact, actual, plain = (t[finite].double() for t in (exact, actual, plain))
    for what, size in (("rms", rms), ("max", largest)):
        error, allowed = size(actual - exact), 2 * size(plain - exact) + floor * (size(exact) or 1.0)
        assert error <= allowed, f"{name}: {what} error {error:.3e} is more than twice plain PyTorch's, {allowed:.3e}"
