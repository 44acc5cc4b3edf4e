"""Every collective of this project, and the count of the bytes they send. Nothing else calls torch.distributed's.

Each comes in two forms. `all_gather(x, ...)` returns its result; `post_all_gather(x, ...)` starts it and returns a
`Handle`, whose `wait()` gives the result once. Collectives of a group run in the order in which they are posted, so
every rank must post the same ones in the same order.

Only `all_reduce`, `all_gather_into_tensor`, `reduce_scatter_tensor` and `all_to_all_single` are used: they are the
ones that work over NCCL, over gloo on CPUs, and over gloo with several ranks on one GPU.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.cp.device import CopyToHost, Side, put_on
from nsa_dist.cp.trace import Trace

# torch 2.13 renamed both and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_MOST_OWED = 4096  # counts of a Traffic that is never read, which keep what they are to count


class Traffic:
    """Bytes this rank sent to other ranks, by kind: `halo`, `compressed`, `bitmap`, `pages`, `layout`, `tokens`.

    Where ranks form domains `pages` go between domains, and `pages.inside` from rank to rank of one.

    Forward and backward are counted apart: the gradient of `pages` travels as `pages.grad`. A ring or tree inside a
    collective may move them more than once; what is counted is the data each rank contributes to each other rank.
    Where ranks read each other's memory, `pages` are what this rank read: over all ranks the same.
    `union_fractions` has for each call, in order, u of every kv head: chosen remote blocks / remote blocks, of which
    `remote_blocks` has the number.
    `passed_on` has for each call in domains how many pages this rank fetched as its share, and how many neighbours
    passed on to it.
    """

    def __init__(self) -> None:
        self._sent_bytes: dict[str, int] = defaultdict(int)
        self._union_fractions: list[list[float]] = []
        self._remote_blocks: list[int] = []
        self._owed: list[Callable[[], None]] = []
        self.passed_on: list[tuple[int, int]] = []

    @property
    def sent_bytes(self) -> dict[str, int]:
        self._settle()
        return self._sent_bytes

    @property
    def union_fractions(self) -> list[list[float]]:
        self._settle()
        return self._union_fractions

    @property
    def remote_blocks(self) -> list[int]:
        self._settle()
        return self._remote_blocks

    def add(self, kind: str, num_bytes: int) -> None:
        self._sent_bytes[kind] += num_bytes

    @contextmanager
    def noting(self, sent: dict[str, int]) -> Iterator[None]:
        """Inside, what is sent is added to `sent` instead."""
        outer, self._sent_bytes = self._sent_bytes, defaultdict(int)
        try:
            yield
        finally:
            sent |= self._sent_bytes
            self._sent_bytes = outer

    def count_union(self, chosen: Tensor, num_remote: int) -> None:
        """chosen int64 [Hkv] on the CPU: how many of the remote blocks this rank's queries chose."""
        self._union_fractions.append((chosen / max(1, num_remote)).tolist())
        self._remote_blocks.append(num_remote)

    def owe(self, count: Callable[[], None]) -> None:
        """`count()` adds what only the device knows: it is called when somebody asks, or when too many are owed."""
        self._owed.append(count)
        if len(self._owed) > _MOST_OWED:
            self._settle()

    def _settle(self) -> None:
        owed, self._owed = self._owed, []
        for count in owed:
            count()

    @property
    def total_bytes(self) -> int:
        return sum(self.sent_bytes.values())


class Work(Protocol):
    """What a collective hands back that is under way."""

    def wait(self) -> Any:
        """Make the current stream wait for it (gloo: the host)."""


class Handle:
    """A collective under way, started on the current stream.

    `wait()` returns its result and may be called once. On a GPU it makes the current stream wait, not the host (gloo:
    the host, too). Until then the handle keeps what is sent alive.
    """

    def __init__(
        self,
        result: Tensor,
        work: Work | None = None,
        sent: Tensor | None = None,
        label: tuple[str, str] = ("", ""),
        trace: Trace | None = None,
    ):
        self._result: Tensor | None = result
        self._work, self._sent, self._label, self._trace = work, sent, label, trace
        self._stream = torch.cuda.current_stream(result.device) if result.is_cuda and work is not None else None

    def wait(self) -> Tensor:
        """The result; its dtype and shape are the collective's. RuntimeError on a second call."""
        if self._result is None:
            raise RuntimeError(
                f"the collective {self._label[0]!r} was waited for twice: its buffers were released the first time; "
                f"keep the tensor that the first wait() returned"
            )
        if self._trace is not None:
            self._trace.add("wait", *self._label)
        if self._work is not None:
            # The stream it was posted from must wait, too: what was sent returns to that stream's memory.
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._work.wait()
            if self._stream is not None:
                torch.cuda.current_stream(self._result.device).wait_stream(self._stream)
        if self._trace is not None:
            self._trace.add("done", *self._label)
        result, self._result, self._work, self._sent = self._result, None, None, None
        return result


class Agreement:
    """Whether all ranks passed the same value, asked by `Comm.post_agree`."""

    def __init__(self, extremes: Tensor, value: int, work: dist.Work | None = None):
        self._expected, self._work = [value, -value], work
        if extremes.is_cuda and work is not None:
            with Side(extremes.device).entered():  # the copy waits for the collective; what computes waits for neither
                work.wait()
                self._work = None
                self._extremes = CopyToHost(extremes)
        else:
            self._extremes = CopyToHost(extremes)

    def wait(self) -> bool:
        """The answer, as often as it is asked for. The host waits if it has not arrived."""
        if self._work is not None:
            self._work.wait()
        return self._extremes.wait().tolist() == self._expected


@dataclass(frozen=True)
class Comm:
    """One context-parallel group, the counter of what is sent over it, and the trace. `group=None` is a group of one.

    To run one rank without the others (a measurement, a test with threads), override `size`, `rank` and the three
    `_start_*`, which fill `out` and return a work with `wait()`, or None if it is done.
    """

    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)
    trace: Trace | None = None

    @property
    def reads_memory(self) -> bool:
        """Whether ranks read each other's memory (`cp.one_sided`)."""
        return False

    def for_call(self, q: Tensor) -> "Comm":
        """This one as it is to serve a call with these queries."""
        return self

    @property
    def generation(self) -> int:
        """Changes on all ranks alike when memory that they read has moved."""
        return 0

    @property
    def in_line(self) -> bool:
        """Whether exchanges run between the kernels of the current stream, none of them under another."""
        return False

    @property
    def is_on_device(self) -> bool:
        """Whether collectives are launches that a CUDA graph can hold: NCCL's, or none."""
        return self.group is None or dist.get_backend(self.group) == "nccl"

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    # --- asynchronous ----------------------------------------------------------------------------------------

    def post_all_gather(self, x: Tensor, kind: str, name: str = "") -> Handle:
        """[...] on every rank -> [P, ...], the same on every rank."""
        if self.size == 1:
            return Handle(x[None])
        sent, out = x.contiguous(), x.new_empty(self.size, *x.shape)
        label = self._count(kind, name, (self.size - 1) * x.nbytes)
        return Handle(out, self._start_all_gather(out, sent, kind), sent, label, self.trace)

    def post_reduce_scatter(self, x: Tensor, kind: str, name: str = "") -> Handle:
        """[P, ...] on every rank -> [...]: the sum over ranks of everybody's x[rank]. The dual of `all_gather`."""
        if self.size == 1:
            return Handle(x[0])
        sent, out = x.contiguous(), x.new_empty(x.shape[1:])
        label = self._count(kind, name, (self.size - 1) * out.nbytes)
        return Handle(out, self._start_reduce_scatter(out, sent, kind), sent, label, self.trace)

    def post_all_to_all(
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int], kind: str, name: str = "",
        most_sent: int | None = None,
    ) -> Handle:  # fmt: skip
        """Rows of `x` [sum(send_sizes), ...] by destination -> [sum(recv_sizes), ...] by source. Its own dual.

        most_sent       sum(send_sizes) of the rank that sends most, for transports that keep room for it
        """
        if self.size == 1:
            return Handle(x)
        sent, out = x.contiguous(), x.new_empty(sum(recv_sizes), *x.shape[1:])
        elsewhere = sum(send_sizes) - send_sizes[self.rank]
        label = self._count(kind, name, elsewhere * x.shape[1:].numel() * x.element_size())
        work = self._start_all_to_all(out, sent, list(recv_sizes), list(send_sizes), kind)
        return Handle(out, work, sent, label, self.trace)

    def post_agree(self, value: int) -> "Agreement":
        """Asks whether every rank passed the same 63-bit value; on a GPU nobody waits for it before `wait`."""
        if self.size == 1:
            return Agreement(torch.tensor([value, -value]), value)
        device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        extremes = put_on(device, torch.tensor([value, -value], dtype=torch.int64))
        self.traffic.add("layout", (self.size - 1) * extremes.nbytes)
        work = dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return Agreement(extremes, value, work)

    def _count(self, kind: str, name: str, num_bytes: int) -> tuple[str, str]:
        self.traffic.add(kind, num_bytes)
        label = (name or kind, kind)
        if self.trace is not None:
            self.trace.add("post", *label, num_bytes)
        return label

    def _start_all_gather(self, out: Tensor, x: Tensor, kind: str) -> Work | None:
        return _all_gather(out.flatten(), x.flatten(), group=self.group, async_op=True)

    def _start_reduce_scatter(self, out: Tensor, x: Tensor, kind: str) -> Work | None:
        return _reduce_scatter(out.flatten(), x.flatten(), group=self.group, async_op=True)

    def _start_all_to_all(
        self, out: Tensor, x: Tensor, recv_sizes: list[int], send_sizes: list[int], kind: str
    ) -> Work | None:
        return dist.all_to_all_single(out, x, recv_sizes, send_sizes, group=self.group, async_op=True)

    # --- at once ---------------------------------------------------------------------------------------------

    def all_gather(self, x: Tensor, kind: str) -> Tensor:
        return self.post_all_gather(x, kind).wait()

    def reduce_scatter(self, x: Tensor, kind: str) -> Tensor:
        return self.post_reduce_scatter(x, kind).wait()

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int], kind: str) -> Tensor:
        return self.post_all_to_all(x, send_sizes, recv_sizes, kind).wait()

    def agree(self, value: int) -> bool:
        """Whether every rank passed the same 63-bit value."""
        return self.post_agree(value).wait()

    # --- trace -----------------------------------------------------------------------------------------------

    def enter(self, phase: str) -> None:
        """What follows belongs to the "forward" or the "backward"."""
        if self.trace is not None:
            self.trace.phase = phase

    def note(self, action: str, name: str, kind: str) -> None:
        """An event of the trace (`Trace.add`) that moves no bytes which are known by now."""
        if self.trace is not None:
            self.trace.add(action, name, kind)

    def computing(self, name: str, kind: str) -> AbstractContextManager[None]:
        """A block that computes; `kind` names the branch."""
        return nullcontext() if self.trace is None else self.trace.span(name, kind)


class CannotShare(RuntimeError):
    """Why the ranks of a group cannot read each other's memory."""


def shared_memory(group: dist.ProcessGroup, num_bytes: int, device: torch.device) -> tuple[Tensor, list[int], object]:
    """Zeros that all ranks of the group can read: own uint8 [num_bytes], its address on each rank, what keeps it there.

    A collective: every rank of the group calls it with the same number. The host waits.
    """
    from torch.distributed import _symmetric_memory as symmetric

    memory = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)  # before anybody knows the address
    handle = symmetric.rendezvous(memory, group)
    if handle is None:
        raise CannotShare("torch's symmetric memory gave no handle for this group")
    return memory, list(handle.buffer_ptrs), handle


def timeout_of(group: Any) -> timedelta:
    """How late a rank may come to a collective of `group` before the others raise; the least of its backends."""
    return min(group._get_backend(device).options._timeout for device in group._device_types)


def fingerprint(text: str) -> int:
    """56 bits of a text, for ranks to compare."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
