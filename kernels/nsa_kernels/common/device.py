"""What a GPU is, asked once: torch takes 5 us a question."""

from functools import cache

import torch
from torch import Tensor


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _major(device: torch.device) -> int:
    """Of the compute capability; 0 for AMD's, which torch numbers otherwise: gfx942 is its 9.4."""
    return 0 if backend() == "hip" else torch.cuda.get_device_capability(device)[0]


def num_multiprocessors(x: Tensor) -> int:
    """Of the GPU that holds `x`."""
    return _multiprocessors(x.device)


def on_hopper(x: Tensor) -> bool:
    """Whether `x` lies on a GPU of compute capability 9."""
    return x.is_cuda and _major(x.device) == 9


def begins_early(x: Tensor) -> bool:
    """Whether launches on the GPU that holds `x` can begin before those that they wait for have ended."""
    return x.is_cuda and _major(x.device) >= 9


def backend() -> str:
    """Of triton's compiler: cuda or hip."""
    return "hip" if torch.version.hip else "cuda"
