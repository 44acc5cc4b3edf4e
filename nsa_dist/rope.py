"""Rotary position embedding at explicit positions: a shard of a sequence has no contiguous range of them.

Angles are taken in fp64: at a position of a million those of fp32 are off by 0.014 (docs/decisions/megatron.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_dist.rope_scaling import Rotary


def frequencies(rotary: Rotary, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Angle of each pair for one position, fp64 [turned / 2]."""
    width = rotary.turned(head_dim)
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / max(width, 1)
    frequency = rotary.base**-exponent
    scaled = frequency if rotary.scaling is None else rotary.scaling.scaled(frequency, rotary.base)
    return scaled / rotary.stretch


class Turns(NamedTuple):
    """Cosine and sine of each token's angles, [T, 1, turned / 2]."""

    cos: Tensor
    sin: Tensor

    def of(self, x: Tensor) -> Tensor:
        """`x` [T, H, D] with its first numbers turned, in its own dtype. Pair i is (x[i], x[i + turned / 2])."""
        half = self.cos.shape[-1]
        if half == 0:
            return x
        first, second, rest = x.to(self.cos.dtype).split([half, half, x.shape[-1] - 2 * half], -1)
        pairs = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return torch.cat(pairs if rest.shape[-1] == 0 else [*pairs, rest], -1).to(x.dtype)


def turns(rotary: Rotary, position: Tensor, head_dim: int, dtype: torch.dtype) -> Turns:
    """Of positions [T], in `dtype` or fp32, whichever is wider, on their device."""
    angle = position.to(torch.float64)[:, None] * frequencies(rotary, head_dim, position.device)
    factor = 1.0 if rotary.scaling is None else rotary.scaling.concentration
    dtype = torch.promote_types(dtype, torch.float32)
    return Turns((factor * angle.cos()).to(dtype)[:, None], (factor * angle.sin()).to(dtype)[:, None])


class Positions:
    """Places of tokens in their documents, int64 [T], and the turns of them, each worked out once for all layers."""

    def __init__(self, position: Tensor) -> None:
        self.position = position
        self._turns: dict[tuple, Turns] = {}

    def __len__(self) -> int:
        return len(self.position)

    def turns(self, rotary: Rotary, head_dim: int, dtype: torch.dtype) -> Turns:
        key = (rotary, head_dim, dtype)
        if key not in self._turns:
            with torch.inference_mode(False):  # kept for batches that train
                self._turns[key] = turns(rotary, self.position, head_dim, dtype)
        return self._turns[key]


def turn_of(rotary: Rotary, head_dim: int, device: torch.device) -> Tensor | None:
    """What kernels turn by, fp64 [turned / 2 + 1]: `frequencies`, then a factor of cosines and sines; None: nothing."""
    if rotary.turned(head_dim) == 0:
        return None
    factor = 1.0 if rotary.scaling is None else rotary.scaling.concentration
    found = frequencies(rotary, head_dim, device)
    return torch.cat([found, found.new_full((1,), factor)])


def rotate(x: Tensor, position: Tensor, rotary: Rotary) -> Tensor:
    """Turn `x` [T, H, D] by its `position` [T] in the document; the result has the dtype of x."""
    return turns(rotary, position.to(x.device), x.shape[-1], x.dtype).of(x)
