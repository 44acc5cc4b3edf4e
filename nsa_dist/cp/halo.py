"""The left halo: rows of the same document just before each local segment, for the window and straddling blocks.

One exchange brings the halos of several tensors. It is posted, and waited for when the rows are needed:

    forward    y[extended(i)] = x[i];  y[recv_rows] = what the owners sent: copies of their x[send_rows]
    backward   dx[i] = dy[extended(i)] + the gradients of every copy of row i, added in ascending rank order in fp32

A sent row is used on several ranks, so its gradient is the sum of what each of them found for it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.cp.comm import Comm, Handle
from nsa_dist.cp.layout import Halo


class RowExchange:
    """One all_to_all for several tensors, under way."""

    def __init__(self, handle: Handle, lengths: list[int], shapes: list[torch.Size]):
        self._handle, self._lengths, self._shapes = handle, lengths, shapes

    def wait(self) -> list[Tensor]:
        """What was received for each tensor: [rows, ...], by source rank."""
        by_rank = self._handle.wait().split(self._lengths)
        count = len(self._shapes)
        return [torch.cat(by_rank[p::count]).reshape(-1, *shape) for p, shape in enumerate(self._shapes)]


def post_halos(tensors: Sequence[Tensor], halos: Sequence[Halo], comm: Comm) -> RowExchange:
    """Send the rows of each x [T, ...] that others need; its `wait()` gives the received rows of each."""
    parts = [x.index_select(0, halo.send_rows) for x, halo in zip(tensors, halos, strict=True)]
    most = [halo.most_sent for halo in halos]
    return _post(parts, [h.send_sizes for h in halos], [h.recv_sizes for h in halos], most, comm, "halo")


def post_halo_gradients(grads: Sequence[Tensor], halos: Sequence[Halo], comm: Comm) -> RowExchange:
    """Send the gradients of received rows home: dy [E, ...] of extended tensors, in fp32 or better."""
    parts = [dy.index_select(0, halo.recv_rows) for dy, halo in zip(grads, halos, strict=True)]
    most = [halo.most_received for halo in halos]
    return _post(parts, [h.recv_sizes for h in halos], [h.send_sizes for h in halos], most, comm, "halo.grad")


def extend(x: Tensor, halo: Halo) -> Tensor:
    """The extended buffer [E, ...] of x [T, ...] with its own rows; the halo's are for `fill`."""
    y = x.new_empty(halo.num_rows, *x.shape[1:])
    return y.index_copy_(0, halo.extended_rows, x)


def fill(y: Tensor, halo: Halo, received: Tensor) -> Tensor:
    """The received rows into their places of an extended buffer."""
    return y.index_copy_(0, halo.recv_rows, received)


def gather_gradients(dy: Tensor, halo: Halo, returned: Tensor) -> Tensor:
    """dx [T, ...] of x from dy [E, ...] of its extension and what other ranks returned, in ascending rank order."""
    dx = dy.index_select(0, halo.extended_rows)
    start = 0
    for size in halo.send_sizes:  # one destination asks for a row at most once
        dx.index_add_(0, halo.send_rows[start : start + size], returned[start : start + size])
        start += size
    return dx


def extended(tensors: Sequence[Tensor], halo: Halo, received: Sequence[Tensor], comm: Comm) -> tuple[Tensor, ...]:
    """Tensors x [T, ...] with their halos of one kind, which have come: [E, ...] each. Differentiable."""
    return _Extended.apply(comm, halo, tuple(received), *tensors)


class _Extended(torch.autograd.Function):
    """Forward and backward: the head of this file. Backward exchanges; forward has its rows already."""

    @staticmethod
    def forward(ctx, comm: Comm, halo: Halo, received: tuple[Tensor, ...], *tensors: Tensor):
        ctx.comm, ctx.halo = comm, halo
        return tuple(fill(extend(x, halo), halo, rows) for x, rows in zip(tensors, received, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return None, None, None, *_gradients(grads, ctx.halo, ctx.comm)


def _gradients(grads: Sequence[Tensor], halo: Halo, comm: Comm) -> list[Tensor]:
    """Of tensors from those of their extensions by one kind of halo, in their dtype, summed in fp32 or better."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    wide = [dy.to(dtype) for dy in grads]
    returned = post_halo_gradients(wide, [halo] * len(wide), comm).wait()
    found = [gather_gradients(dy, halo, rows) for dy, rows in zip(wide, returned, strict=True)]
    return [dx.to(dy.dtype) for dx, dy in zip(found, grads, strict=True)]


def _post(
    parts: Sequence[Tensor],
    send_sizes: Sequence[Sequence[int]],
    recv_sizes: Sequence[Sequence[int]],
    most_sent: Sequence[int],
    comm: Comm,
    kind: str,
) -> RowExchange:
    """Part p has send_sizes[p][rank] rows for each rank and gets recv_sizes[p][rank]; most_sent[p] no rank exceeds."""
    widths = [part.shape[1:].numel() for part in parts]
    unit = math.gcd(*widths)  # rows of what is sent: one width for all parts
    pieces = [part.split(list(sizes)) for part, sizes in zip(parts, send_sizes, strict=True)]
    flat = torch.cat([piece[rank].reshape(-1) for rank in range(comm.size) for piece in pieces]).view(-1, unit)

    def lengths(sizes: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows of each part, for each rank."""
        return [[s[rank] * width // unit for s, width in zip(sizes, widths, strict=True)] for rank in range(comm.size)]

    sent, got = lengths(send_sizes), lengths(recv_sizes)
    most = sum(count * width // unit for count, width in zip(most_sent, widths, strict=True))
    handle = comm.post_all_to_all(flat, [sum(n) for n in sent], [sum(n) for n in got], kind, most_sent=most)
    return RowExchange(handle, [n for of_rank in got for n in of_rank], [part.shape[1:] for part in parts])
