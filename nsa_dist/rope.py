"""Rotary position embedding at explicit positions: a shard of a sequence has no contiguous range of them."""

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Turn `x` [T, H, D] by its `position` [T] in the document, angle `position / base ** (2i / D)` for pair i.

    Pair i is (x[i], x[i + D/2]), Megatron's default. Angles are fp32 whatever the dtype of x, which is returned.
    """
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = position.to(x.device, torch.float32)[:, None] * base**-exponent  # [T, D/2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(dtype).split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
