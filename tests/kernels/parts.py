"""What is asked of decoding from a cache in parts, however its compressed rows lie in them."""

from collections.abc import Callable, Sequence

import torch

from kernels.judge import assert_twice
from kernels.paged import Drawn
from nsa_kernels.decode_part import part
from nsa_kernels.reference import decode as reference

Parts = list[part.CachePart] | list[part.TokenPart]
Answer = tuple[torch.Tensor, torch.Tensor]


def the_answer(answers: Sequence[Answer], compare: bool = True) -> Answer:
    """out and blocks, which are the same for every part."""
    for out, blocks in answers[1:] if compare else []:
        assert torch.equal(out, answers[0][0])
        assert torch.equal(blocks, answers[0][1])
    return answers[0]


def check_step(drawn: Drawn, dtype: torch.dtype, device, cut: Callable, decoded: Callable) -> tuple[Parts, Drawn]:
    """A step against the fp64 reference: `decoded` on what `cut` makes of it. The parts after it, and the same cache in
    one piece after the reference's step in `dtype`."""
    exact, plain, mine = drawn.to(torch.float64), drawn.to(dtype), drawn.to(dtype, device)
    parts = cut(mine)
    expected, expected_blocks = exact.decode(reference)
    rounded, _ = plain.decode(reference)
    out, blocks = decoded(mine, parts)
    assert torch.equal(blocks.cpu(), expected_blocks)
    assert_twice("out", out.cpu(), rounded, expected)
    for held in parts:
        assert torch.equal(held.cache.lengths.cpu(), exact.cache.lengths)
    return parts, plain
