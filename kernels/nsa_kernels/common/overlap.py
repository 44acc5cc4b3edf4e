"""Launches that begin before the one that they wait for has ended: programmatic dependent launches, from compute
capability 9 on.

A kernel calls `wait` in every program before it reads what a launch before it wrote, and before it writes; so a launch
that has ended tells that all before it have. Where a kernel calls `let_next_begin`, in all of its programs, the
programs of the next launch may come onto the card, where there is room.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from nsa_kernels.common.device import begins_early


@triton.jit
def wait(OVERLAPS: tl.constexpr):
    """For all that was launched before."""
    if OVERLAPS:
        cuda.gdc_wait()


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    if OVERLAPS:
        cuda.gdc_launch_dependents()


def overlapping(x: Tensor) -> dict[str, Any]:
    """Options of a launch on the device of `x`, whose kernel has OVERLAPS."""
    return {"OVERLAPS": True, "launch_pdl": True} if begins_early(x) else {"OVERLAPS": False}
