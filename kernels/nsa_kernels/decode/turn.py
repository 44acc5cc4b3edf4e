"""Rotary positions of compressed keys, inside of kernels: pairs (y[i], y[i + half]) of the first 2 * half numbers.

A tensor of `turn` has in fp64 the angle of each pair for one position, and last a factor of cosines and sines.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def partner(dim, half):
    """The other number of the pair of `dim`; itself where it is not turned."""
    return tl.where(dim < half, dim + half, tl.where(dim < 2 * half, dim - half, dim))


@triton.jit
def turned(y, other, dim, position, turn_ptr, half):
    """y [M, D], the numbers `dim` [D], turned by `position` [M]; `other` are their partners. fp32, or as y if wider."""
    is_turned = dim < 2 * half
    pair = tl.where(dim < half, dim, dim - half)
    angle = position.to(tl.float64)[:, None] * tl.load(turn_ptr + pair, mask=is_turned, other=0.0)[None, :]
    factor = tl.load(turn_ptr + half)
    cos = (factor * tl.cos(angle)).to(tl.float32)
    sin = (factor * tl.sin(angle)).to(tl.float32)
    y = y.to(tl.float32)
    other = other.to(tl.float32)
    return tl.where(is_turned[None, :], y * cos + tl.where((dim < half)[None, :], -other, other) * sin, y)


def turns_of(turn: Tensor | None, turn2: Tensor | None, unread: Tensor) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """Both tensors, with one that is not read in place of None, and half of what each turns."""
    halves = [0 if x is None else len(x) - 1 for x in (turn, turn2)]
    found = [x for x in (turn, turn2) if x is not None]
    first, second = (found or [unread])[0], (found or [unread])[-1]
    return (first, second), halves
