"""Every collective of this project, and the count of the bytes they send. Nothing else calls torch.distributed's.

Only `all_reduce`, `all_gather_into_tensor`, `reduce_scatter_tensor` and `all_to_all_single` are used: they are the
ones that work over NCCL, over gloo on CPUs, and over gloo with several ranks on one GPU.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """Bytes this rank sent to other ranks, by kind: `halo`, `compressed`, `bitmap`, `pages`, `layout`.

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


@dataclass(frozen=True)
class Comm:
    """One context-parallel group and the counter of what is sent over it. `group=None` is a group of one."""

    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def all_gather(self, x: Tensor, kind: str) -> Tensor:
        """[...] on every rank -> [P, ...], the same on every rank."""
        if self.size == 1:
            return x[None]
        self.traffic.add(kind, (self.size - 1) * x.nbytes)
        out = x.new_empty(self.size, *x.shape)
        _all_gather(out.flatten(), x.contiguous().flatten(), group=self.group)
        return out

    def reduce_scatter(self, x: Tensor, kind: str) -> Tensor:
        """[P, ...] on every rank -> [...]: the sum over ranks of everybody's x[rank]. The dual of `all_gather`."""
        if self.size == 1:
            return x[0]
        out = x.new_empty(x.shape[1:])
        self.traffic.add(kind, (self.size - 1) * out.nbytes)
        _reduce_scatter(out.flatten(), x.contiguous().flatten(), group=self.group)
        return out

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int], kind: str) -> Tensor:
        """Rows of `x` [sum(send_sizes), ...] by destination -> [sum(recv_sizes), ...] by source. Its own dual."""
        if self.size == 1:
            return x
        elsewhere = sum(send_sizes) - send_sizes[self.rank]
        self.traffic.add(kind, elsewhere * x[:1].numel() * x.element_size())
        out = x.new_empty(sum(recv_sizes), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(recv_sizes), list(send_sizes), group=self.group)
        return out

    def agree(self, value: int) -> bool:
        """Whether every rank passed the same 63-bit value."""
        if self.size == 1:
            return True
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        extremes = torch.tensor([value, -value], dtype=torch.int64, device=device)
        self.traffic.add("layout", (self.size - 1) * extremes.nbytes)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        return extremes.tolist() == [value, -value]
