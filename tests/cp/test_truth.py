"""What tests/cp/test_gpu.py judges by: the truth is the layer's own in fp64, the yardstick is near it."""

import pytest
import torch

import cp_truth
from cases import SMALL, make_inputs, run


@pytest.mark.parametrize("lengths", [[150], [17, 64, 5, 40, 1]], ids=str)
def test_the_truth_is_the_layer_in_fp64(lengths):
    inputs, bounds = make_inputs(sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)
    out, ids, grads, _ = run(inputs, SMALL, lengths)
    given = inputs.leaves(), [inputs.phi_k, inputs.phi_v], inputs.weight, ids, SMALL, bounds
    exact = cp_truth.truth(*given, torch.float64)
    for mine, whole in zip(exact, [out, *grads], strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-10)
    for name, dtype, most in (("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 5e-2)):
        errors = [_relative(x, e) for x, e in zip(cp_truth.plain(*given, dtype), exact, strict=True)]
        assert max(errors) < most, (name, errors)
        assert min(errors) > most / 1e3, (name, errors)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()
