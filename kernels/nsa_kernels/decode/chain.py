"""What a step of decoding takes at least: launches, and reads that wait for each other, with no other work.

A step is three launches, in each of which a program reads what says where to read next:

    1   slot of the sequence -> its length and pages -> compressed keys                     3 reads
    2   what the first launch left                                                          1
    3   candidates -> pages -> keys -> the programs' count -> what the others left          3, an atomic, 1

Here a multiprocessor has one program in each launch, which reads one number at a time: from the card's memory where
nothing has read it before in the step, else from its cache. Launches overlap as those of the step do.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.device import num_multiprocessors
from nsa_kernels.common.overlap import let_next_begin, overlapping, wait

APART = 1024  # numbers, so that reads share no line


@triton.jit
def _chain_kernel(
    given_ptr, cold_ptr, left_ptr, counter_ptr,
    GIVEN: tl.constexpr, COLD: tl.constexpr, COUNTED: tl.constexpr, APART: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Reads what the launch before left if told to, then COLD zeros one behind the other, and leaves one more than it
    was given. COUNTED: programs count themselves, and the one that comes last reads what another has left."""
    program = tl.program_id(0)
    wait(OVERLAPS)
    let_next_begin(OVERLAPS)
    at = program * APART
    if GIVEN:
        at += tl.load(given_ptr + at, cache_modifier=".cg")
    for i in tl.static_range(COLD):
        at += tl.load(cold_ptr + at + i * tl.num_programs(0) * APART)
    tl.store(left_ptr + program * APART, at - program * APART + 1)
    if COUNTED:
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(left_ptr + 1, tl.load(left_ptr + APART, cache_modifier=".cg"))
            tl.store(counter_ptr, 0)


def chain(like: Tensor) -> Callable[[], Tensor]:
    """The three launches, on the device of `like`; they leave 3 for each program, APART numbers apart."""
    programs = num_multiprocessors(like)
    cold, warm, *left = torch.zeros(5, 4 * programs * APART, dtype=torch.int32, device=like.device)
    counter = torch.zeros(1, dtype=torch.int32, device=like.device)

    def launch(given: Tensor, read: Tensor, to: Tensor, **reads: int) -> None:
        _chain_kernel[(programs,)](given, read, to, counter, APART=APART, **reads, **overlapping(like), num_warps=4)

    def step() -> Tensor:
        launch(left[2], cold, left[0], GIVEN=0, COLD=3, COUNTED=0)
        launch(left[0], cold, left[1], GIVEN=1, COLD=0, COUNTED=0)
        launch(left[1], warm, left[2], GIVEN=1, COLD=2, COUNTED=1)
        return left[2]

    return step
