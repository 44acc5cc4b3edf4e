"""Rotary position embedding at explicit positions: a shard of a sequence has no contiguous range of them.

Angles are taken in fp64: at a position of a million those of fp32 are off by 0.014 (docs/decisions/megatron.md).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_dist.rope_scaling import Llama3Scaling, YarnScaling


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned: pair i of the turned numbers by `position / base ** (2i / turned)`, then scaled.

    percent     the share of a head that is turned, its first numbers; 0: none, which is NoPE
    stretch     positions are divided by it (linear interpolation)
    scaling     of the frequencies, for contexts longer than those a model was trained with

    ValueError for a base, percent or stretch that is none, or YaRN with another percent or stretch than 1.
    """

    base: float = 10_000.0
    percent: float = 1.0
    stretch: float = 1.0
    scaling: Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        if not (self.base > 1 and 0 <= self.percent <= 1 and self.stretch > 0):
            raise ValueError(
                f"base={self.base}, percent={self.percent} and stretch={self.stretch} must be above 1, from 0 to 1, "
                f"and positive, or they say nothing about positions; 10000, 1 and 1 are the usual ones"
            )
        if isinstance(self.scaling, YarnScaling) and (self.percent not in (0, 1) or self.stretch != 1):
            raise ValueError(
                f"percent={self.percent} and stretch={self.stretch} change what is turned, but YaRN's ramp is over the "
                f"pairs of a whole head, at their own positions; take percent=1 and stretch=1, or another scaling"
            )

    def turned(self, head_dim: int) -> int:
        """How many of a head's numbers are turned, the first ones. ValueError if they do not make pairs."""
        width = int(head_dim * self.percent)
        if width % 2:
            raise ValueError(
                f"percent={self.percent} of head_dim={head_dim} is {width} numbers, and rotary positions turn pairs of "
                f"them; take percent={(width + 1) / head_dim:g}"
            )
        return width

    def frequencies(self, head_dim: int, device: torch.device | None = None) -> Tensor:
        """Angle of each pair for one position, fp64 [turned / 2]."""
        width = self.turned(head_dim)
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / max(width, 1)
        frequency = self.base**-exponent
        return (frequency if self.scaling is None else self.scaling.scaled(frequency, self.base)) / self.stretch

    def at(self, position: Tensor, head_dim: int, dtype: torch.dtype) -> "Turns":
        """The turns of positions [T], in `dtype` or fp32, whichever is wider, on their device."""
        angle = position.to(torch.float64)[:, None] * self.frequencies(head_dim, position.device)
        factor = 1.0 if self.scaling is None else self.scaling.concentration
        dtype = torch.promote_types(dtype, torch.float32)
        return Turns((factor * angle.cos()).to(dtype)[:, None], (factor * angle.sin()).to(dtype)[:, None])


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


def rotate(x: Tensor, position: Tensor, rotary: Rotary) -> Tensor:
    """Turn `x` [T, H, D] by its `position` [T] in the document; the result has the dtype of x."""
    return rotary.at(position.to(x.device), x.shape[-1], x.dtype).of(x)
