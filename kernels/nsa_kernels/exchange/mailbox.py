"""A mailbox: memory of every member of a group that all members can read, with two slots that are used in turn.

    member m    bases[m] -->  flags [members] int32, then slot 0, then slot 1

An exchange: a member *puts* what it has into its own slot `epoch % 2`, then *meets* all others, which raises its epoch
by one, and then *takes* from the slots of all, which no epoch but the one after next writes to again. So what a member
takes of an exchange it must have queued before it meets for the next, on the stream on which it puts and meets.
The epoch is in device memory: a captured CUDA graph goes on from where the last call was.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

FLAG_BYTES = 1024  # of the flags in front of the slots: 256 members
SLOT_ALIGNMENT = 256  # bytes, of slots and of parts in them


@dataclass(frozen=True)
class Mailbox:
    """bases int64 [members], epoch int32 [1], notice int32 [2] in memory that the host reads, all of one member.

    kept        what must live as long: the memory behind the addresses
    """

    bases: Tensor
    epoch: Tensor
    notice: Tensor
    member: int
    slot_bytes: int
    kept: tuple = ()

    @property
    def num_members(self) -> int:
        return len(self.bases)

    @staticmethod
    def total_bytes(slot_bytes: int) -> int:
        """Of a member's memory."""
        return FLAG_BYTES + 2 * slot_bytes


def aligned(num_bytes: int) -> int:
    """The least multiple of SLOT_ALIGNMENT that is not below."""
    return -(-num_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


@triton.jit
def slot_to_put(bases, epoch, member, slot_bytes, FLAGS: tl.constexpr):
    """Address of the member's own slot in the exchange that comes."""
    return tl.load(bases + member) + FLAGS + (tl.load(epoch) & 1).to(tl.int64) * slot_bytes


@triton.jit
def slot_to_take(bases, epoch, member, slot_bytes, FLAGS: tl.constexpr):
    """Address of a member's slot in the exchange that was met for."""
    return tl.load(bases + member) + FLAGS + ((tl.load(epoch) + 1) & 1).to(tl.int64) * slot_bytes
