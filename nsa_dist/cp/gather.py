"""The compressed keys and values of the whole sequence, on every rank: S / 16 bytes of one layer's K/V.

    forward    y [rows, ...]    = concat(pad(x_0), ..., pad(x_{P-1}))[rows], zero between documents that are aligned
    backward   dx_r [own, ...]  = sum over ranks s of dy_s at the rows that came from x_r, in fp32

Every rank uses a copy of x_r, so the gradient of x_r is the sum of what every rank found for it: an all_gather
forward, a reduce_scatter backward. One collective carries keys and values.
"""

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm, Handle
from nsa_dist.cp.layout import RankLayout


class CompressedGather:
    """Own compressed blocks k [own, Hkv, Dk], v [own, Hkv, Dv] on their way to every rank."""

    def __init__(self, k: Tensor, v: Tensor, layout: RankLayout, comm: Comm):
        self._own, self._layout = (k, v), layout
        self._handle: Handle | None = None
        if comm.size > 1:
            padded = k.new_zeros(layout.num_cmp_max, k.shape[1], k.shape[2] + v.shape[2])
            torch.cat([k, v], -1, out=padded[: len(k)])
            self._handle = comm.post_all_gather(padded, "compressed")

    def wait(self) -> tuple[Tensor, Tensor]:
        """Those of the sequence, [layout.num_cmp_rows, Hkv, Dk] and [.., Hkv, Dv]: over ranks views of one buffer."""
        if self._handle is None:
            return self._placed(self._own[0]), self._placed(self._own[1])
        both = self._placed(self._handle.wait().flatten(0, 1).index_select(0, self._layout.cmp_gather_rows))
        dim_k = self._own[0].shape[2]
        return both[..., :dim_k], both[..., dim_k:]

    def _placed(self, blocks: Tensor) -> Tensor:
        """Blocks [M, ...] in their compressed rows."""
        place = self._layout.cmp_place
        if place is None:
            return blocks
        return blocks.new_zeros(self._layout.num_cmp_rows, *blocks.shape[1:]).index_copy_(0, place, blocks)


class CompressedReturn:
    """The gradients of some heads of the gathered keys and values, dk [rows, h, Dk], dv [.., Dv], on their way home.

    Over ranks they are fp32 or better, for they are terms of a sum.
    """

    def __init__(self, dk: Tensor, dv: Tensor, num_own: int, layout: RankLayout, comm: Comm, name: str):
        self._num_own, self._dims = num_own, (dk.shape[2], dv.shape[2])
        self._handle: Handle | None = None
        if comm.in_line:
            from nsa_dist.cp.one_sided.rows import return_compressed

            self._grads: tuple[Tensor, ...] = return_compressed(dk, dv, num_own, layout, comm)
            return
        if layout.cmp_place is not None:
            dk, dv = (grad.index_select(0, layout.cmp_place) for grad in (dk, dv))
        self._grads = (dk, dv)
        if comm.size > 1:
            total = dk.new_zeros(comm.size * layout.num_cmp_max, dk.shape[1], sum(self._dims))
            for part, grad in zip(total.split(self._dims, -1), (dk, dv), strict=True):
                part.index_copy_(0, layout.cmp_gather_rows, grad)
            self._handle = comm.post_reduce_scatter(total.unflatten(0, (comm.size, -1)), "compressed.grad", name)
            self._grads = ()

    def wait(self) -> tuple[Tensor, ...]:
        """Of the own blocks, [own, h, Dk] and [own, h, Dv]; fp32 or better over ranks."""
        if self._handle is None:
            return self._grads
        return self._handle.wait()[: self._num_own].split(self._dims, -1)
