"""Decoding from a paged cache against the fp64 reference: outputs by the twice rule, blocks, and what the cache holds."""

import pytest
import torch

from kernels.judge import assert_twice
from kernels.pace import SLOW_WITHOUT_A_GPU
from kernels.paged import draw
from nsa_kernels.decode import append, attention
from nsa_kernels.reference import decode as reference


class Kernels:
    decode_append = staticmethod(append.decode_append)
    decode_store = staticmethod(append.decode_store)
    decode_attention = staticmethod(attention.decode_attention)


def check(drawn, dtype, device):
    """Returns the kernels' results."""
    exact, plain, mine = drawn.to(torch.float64), drawn.to(dtype), drawn.to(dtype, device)
    expected, expected_blocks = exact.decode(reference)
    rounded, _ = plain.decode(reference)
    out, blocks = mine.decode(Kernels)
    assert torch.equal(blocks.cpu(), expected_blocks)
    assert_twice("out", out.cpu(), rounded, expected)
    for name, held, wanted in zip(exact.cache._fields, mine.cache, exact.cache, strict=True):
        if name in ("k_cmp", "v_cmp"):  # phi was computed in another dtype
            wanted = plain.cache._asdict()[name]
            torch.testing.assert_close(held.cpu(), wanted, rtol=1e-2, atol=1e-2, equal_nan=True)
        else:
            assert torch.equal(held.cpu().double().nan_to_num(7e7), wanted.double().nan_to_num(7e7)), name
    return out, blocks


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((4, 2, 16, 16), torch.bfloat16),
        ((3, 1, 48, 32), torch.float16),
        pytest.param((2, 2, 16, 16), torch.float32, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 1, 16, 16), torch.bfloat16, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((32, 2, 128, 128), torch.bfloat16, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((16, 1, 192, 128), torch.bfloat16, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 8, 64, 64), torch.bfloat16, marks=SLOW_WITHOUT_A_GPU),
    ],
)
def test_mixed_lengths_and_an_empty_slot(heads, dtype, device):
    check(draw([700, None, 0, 31, 1100], 1, heads, dtype=dtype), dtype, device)
