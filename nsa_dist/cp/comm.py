"""Every collective of this project, and the count of the bytes they send. Nothing else calls torch.distributed's.

Each comes in two forms. `all_gather(x, ...)` returns its result; `post_all_gather(x, ...)` starts it and returns a
`Handle`, whose `wait()` gives the result once. Collectives of a group run in the order in which they are posted, so
every rank must post the same ones in the same order.

Only `all_reduce`, `all_gather_into_tensor`, `reduce_scatter_tensor` and `all_to_all_single` are used: they are the
ones that work over NCCL, over gloo on CPUs, and over gloo with several ranks on one GPU.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.cp.device import CopyToHost, Side, put_on
from nsa_dist.cp.trace import Trace

# torch 2.13 renamed both and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """Bytes this rank sent to other ranks, by kind: `halo`, `compressed`, `bitmap`, `pages`, `layout`, `tokens`.

    Forward and backward are counted apart: the gradient of `pages` travels as `pages.grad`. A ring or tree inside a
    collective may move them more than once; what is counted is the data each rank contributes to each other rank.
    `union_fractions` has for each call, in order, u of every kv head: chosen remote blocks / remote blocks.
    """

    sent_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    union_fractions: list[list[float]] = field(default_factory=list)

    def add(self, kind: str, num_bytes: int) -> None:
        self.sent_bytes[kind] += num_bytes

    def count_union(self, chosen: Tensor, num_local: int) -> None:
        """chosen bool [Hkv, num_blocks] on the CPU: the remote blocks this rank's queries chose."""
        num_remote = chosen.shape[1] - num_local
        self.union_fractions.append((chosen.sum(1) / max(1, num_remote)).tolist())

    @property
    def total_bytes(self) -> int:
        return sum(self.sent_bytes.values())


class Handle:
    """A collective under way, started on the current stream.

    `wait()` returns its result and may be called once. On a GPU it makes the current stream wait, not the host (gloo:
    the host, too). Until then the handle keeps what is sent alive.
    """

    def __init__(
        self,
        result: Tensor,
        work: dist.Work | None = None,
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
        self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int], kind: str, name: str = ""
    ) -> Handle:
        """Rows of `x` [sum(send_sizes), ...] by destination -> [sum(recv_sizes), ...] by source. Its own dual."""
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

    def _start_all_gather(self, out: Tensor, x: Tensor, kind: str) -> dist.Work | None:
        return _all_gather(out.flatten(), x.flatten(), group=self.group, async_op=True)

    def _start_reduce_scatter(self, out: Tensor, x: Tensor, kind: str) -> dist.Work | None:
        return _reduce_scatter(out.flatten(), x.flatten(), group=self.group, async_op=True)

    def _start_all_to_all(
        self, out: Tensor, x: Tensor, recv_sizes: list[int], send_sizes: list[int], kind: str
    ) -> dist.Work | None:
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

    def computing(self, name: str, kind: str) -> AbstractContextManager[None]:
        """A block that computes; `kind` names the branch."""
        return nullcontext() if self.trace is None else self.trace.span(name, kind)
