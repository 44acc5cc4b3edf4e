"""The compressed keys and values of the whole sequence, on every rank: S / 16 bytes of one layer's K/V."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.layout import RankLayout


def gather_compressed(k: Tensor, v: Tensor, layout: RankLayout, comm: Comm) -> tuple[Tensor, Tensor]:
    """Own compressed blocks k [own, Hkv, Dk], v [own, Hkv, Dv] -> those of the sequence, [M, Hkv, Dk], [M, Hkv, Dv].

    One collective carries both; the results are views of one buffer, not contiguous. A group of one gets its input.
    """
    if comm.size == 1:
        return k, v
    both = _GatherRows.apply(torch.cat([k, v], -1), layout.num_cmp_max, layout.cmp_gather_rows, comm)
    return both[..., : k.shape[-1]], both[..., k.shape[-1] :]


class _GatherRows(torch.autograd.Function):
    """all_gather forward, reduce_scatter(sum) backward, through a map of rows.

    forward    y [M, ...]       = concat(pad(x_0), ..., pad(x_{P-1}))[rows]      identical on every rank
    backward   dx_r [own, ...]  = sum over ranks s of dy_s at the rows that came from x_r, in fp32

    Every rank uses a copy of x_r, so the gradient of x_r is the sum of what every rank found for it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, num_max: int, rows: Tensor, comm: Comm):
        ctx.comm, ctx.num_own, ctx.num_max = comm, x.shape[0], num_max
        ctx.save_for_backward(rows)
        padded = x.new_zeros(num_max, *x.shape[1:])
        padded[: x.shape[0]] = x
        return comm.all_gather(padded, "compressed").flatten(0, 1).index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (rows,) = ctx.saved_tensors
        dtype = torch.promote_types(dy.dtype, torch.float32)
        total = torch.zeros(ctx.comm.size * ctx.num_max, *dy.shape[1:], dtype=dtype, device=dy.device)
        total.index_copy_(0, rows, dy.to(dtype))
        dx = ctx.comm.reduce_scatter(total.unflatten(0, (ctx.comm.size, ctx.num_max)), "compressed.grad")
        return dx[: ctx.num_own].to(dy.dtype), None, None, None
