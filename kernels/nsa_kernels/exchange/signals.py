"""Meet: all members have put what they have, and see what the others have put.

One program, so that it takes one multiprocessor's place and never that of a kernel it waits for. It raises the
member's flag at every other member (release, system scope) and waits until all have raised theirs (acquire).
"""

import triton
import triton.language as tl

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import next_power_of_2
from nsa_kernels.exchange.mailbox import Mailbox

NO_LIMIT = 0


@triton.jit
def _now_ns():
    return tl.extra.cuda.globaltimer()


@triton.jit
def _leave(zero):
    """End the kernel, and with it all that the process has on the device: nobody goes on with what is not there."""
    tl.inline_asm_elementwise(
        "mov.u32 $0, $1; membar.sys; trap;", "=r,r", [zero], dtype=tl.int32, is_pure=False, pack=1
    )


@launchable
@triton.jit(do_not_specialize=["member", "limit_ns"])
def _meet_kernel(bases, epoch, notice, member, limit_ns, MEMBERS: tl.constexpr, LANES: tl.constexpr,
                 WAITS: tl.constexpr):  # fmt: skip
    other = tl.arange(0, LANES)
    exists = other < MEMBERS
    base = tl.load(bases + other, mask=exists, other=0)
    mine = tl.load(epoch) + 1
    theirs = (base + 4 * member).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(theirs, mine, mask=exists, sem="release", scope="sys")
    if WAITS:
        flags = tl.load(bases + member).to(tl.pointer_type(tl.int32)) + other
        start = _now_ns()
        raised = tl.atomic_add(flags, 0, mask=exists, sem="acquire", scope="sys")
        missing = tl.sum((exists & (raised - mine < 0)).to(tl.int32))
        while missing > 0:
            raised = tl.atomic_add(flags, 0, mask=exists, sem="acquire", scope="sys")
            late = exists & (raised - mine < 0)
            missing = tl.sum(late.to(tl.int32))
            if (missing > 0) & (limit_ns > 0) & (_now_ns() - start > limit_ns):
                tl.store(notice + 1, mine)
                tl.store(notice, tl.min(tl.where(late, other, LANES)) + 1)
                _leave(missing)
    tl.store(epoch, mine)


def meet(box: Mailbox, limit_ns: int = NO_LIMIT, *, waits: bool = True) -> None:
    """Queue the meeting of all members on the current stream.

    limit_ns    after so long the kernel writes to `box.notice` which member is missing, counted from 1, and the epoch,
                and traps: the context is lost, and the next call of CUDA raises. 0: wait for ever
    waits       False: raise the flags only, where somebody else sees to the order
    """
    _meet_kernel[(1,)](
        box.bases, box.epoch, box.notice, box.member, limit_ns,
        MEMBERS=box.num_members, LANES=next_power_of_2(box.num_members), WAITS=waits, num_warps=1,
    )  # fmt: skip
