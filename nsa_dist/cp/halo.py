"""The left halo: rows of the same document just before each local segment, for the window and straddling blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.layout import Halo


def exchange_halos(pairs: Sequence[tuple[Tensor, Halo]], comm: Comm) -> tuple[Tensor, ...]:
    """Extend several tensors by their halos with one all_to_all.

    each x [T, ...] -> [E, ...], the rows of its segments with their halos before them. A tensor whose layout has no
    halo rows anywhere on any rank (a group of one) is returned as it is.
    """
    if comm.size == 1:
        return tuple(x for x, _ in pairs)
    halos = tuple(halo for _, halo in pairs)
    return _ExchangeHalos.apply(comm, halos, *(x for x, _ in pairs))


class _ExchangeHalos(torch.autograd.Function):
    """Copies of rows out, sums of gradients back.

    forward    y[extended(i)] = x[i];  y[recv_rows] = what the owners sent: copies of their x[send_rows]
    backward   dx[i] = dy[extended(i)] + the gradients of every copy of row i, added in ascending rank order in fp32

    A sent row is used on several ranks, so its gradient is the sum of what each of them found for it.
    """

    @staticmethod
    def forward(ctx, comm: Comm, halos: tuple[Halo, ...], *tensors: Tensor):
        ctx.comm, ctx.halos = comm, halos
        received = _exchange(
            [x.index_select(0, halo.send_rows) for x, halo in zip(tensors, halos, strict=True)],
            [halo.send_sizes for halo in halos],
            [halo.recv_sizes for halo in halos],
            comm,
            "halo",
        )
        extended = []
        for x, halo, rows in zip(tensors, halos, received, strict=True):
            y = x.new_empty(halo.num_rows, *x.shape[1:])
            y.index_copy_(0, halo.extended_rows, x)
            y.index_copy_(0, halo.recv_rows, rows)
            extended.append(y)
        return tuple(extended)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        halos = ctx.halos
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        returned = _exchange(
            [dy.index_select(0, halo.recv_rows).to(dtype) for dy, halo in zip(grads, halos, strict=True)],
            [halo.recv_sizes for halo in halos],
            [halo.send_sizes for halo in halos],
            ctx.comm,
            "halo.grad",
        )
        result = []
        for dy, halo, rows in zip(grads, halos, returned, strict=True):
            dx = dy.index_select(0, halo.extended_rows).to(dtype)
            start = 0
            for size in halo.send_sizes:  # one destination asks for a row at most once
                dx.index_add_(0, halo.send_rows[start : start + size], rows[start : start + size])
                start += size
            result.append(dx.to(dy.dtype))
        return None, None, *result


def _exchange(
    parts: Sequence[Tensor],
    send_sizes: Sequence[Sequence[int]],
    recv_sizes: Sequence[Sequence[int]],
    comm: Comm,
    kind: str,
) -> list[Tensor]:
    """One all_to_all for several tensors: part p has send_sizes[p][rank] rows for each rank, and gets recv_sizes."""
    widths = [part[:1].numel() if len(part) else part.shape[1:].numel() for part in parts]
    pieces = [part.split(list(sizes)) for part, sizes in zip(parts, send_sizes, strict=True)]
    flat = torch.cat([piece[rank].reshape(-1) for rank in range(comm.size) for piece in pieces])
    sent = [
        sum(sizes[rank] * width for sizes, width in zip(send_sizes, widths, strict=True)) for rank in range(comm.size)
    ]
    got = [
        sum(sizes[rank] * width for sizes, width in zip(recv_sizes, widths, strict=True)) for rank in range(comm.size)
    ]
    flat = comm.all_to_all(flat, sent, got, kind)
    lengths = [
        sizes[rank] * width for rank in range(comm.size) for sizes, width in zip(recv_sizes, widths, strict=True)
    ]
    by_rank = flat.split(lengths)
    return [torch.cat(by_rank[p :: len(parts)]).reshape(-1, *part.shape[1:]) for p, part in enumerate(parts)]
