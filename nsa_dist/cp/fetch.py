"""Fetch only the selected blocks: a bitmap tells every owner what to send, pages travel once, gradients go home.

Per key-value head a rank marks the global selection blocks its queries chose and it does not hold. Bitmaps are
exchanged; their set bits in ascending order are the list of pages on both sides, so no index ever travels.

    owner 0 holds blocks 0 1, rank 1 marks 1 1 0 0 for head 0 and 0 1 0 0 for head 1
    owner 0 sends rank 1 the pages  (head 0, block 0) (head 0, block 1) (head 1, block 1)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.layout import RankLayout


@dataclass(frozen=True)
class FetchedPages:
    """What the selected-attention kernel reads through. `k`, `v` are None when nothing can be remote."""

    k: Tensor | None  # [pages, l', Dk]
    v: Tensor | None  # [pages, l', Dv]
    block_table: Tensor  # int32 [Hkv, num_blocks]: page of each block, local pages first; -1 for those not here


@dataclass(frozen=True)
class _Route:
    """Pages to send and to receive, each list ordered by the other rank, then head, then block."""

    send_head: Tensor  # int64 [sum(send_sizes)]
    send_page: Tensor  # int64, local page
    send_sizes: tuple[int, ...]
    recv_sizes: tuple[int, ...]


def fetch_selected(k: Tensor, v: Tensor, block_indices: Tensor, layout: RankLayout, comm: Comm) -> FetchedPages:
    """The remote blocks that `block_indices` [T, Hkv, n] names, from the ranks that hold them.

    k [T, Hkv, Dk] and v [T, Hkv, Dv] are this rank's own; differentiable in both.
    """
    num_kv_heads, num_blocks = k.shape[1], len(layout.block_owner)
    table = torch.full((num_kv_heads, num_blocks), -1, dtype=torch.int32, device=k.device)
    num_local = len(layout.local_blocks)
    table[:, layout.local_blocks] = torch.arange(num_local, dtype=torch.int32, device=k.device)
    if comm.size == 1:
        return FetchedPages(None, None, table)
    wanted = exchange_bitmaps(chosen_elsewhere(block_indices, layout), comm)  # [P, Hkv, num_blocks]
    route, recv_head, recv_block = _route(wanted, table, layout, comm)
    pages = _FetchPages.apply(k, v, route, layout, comm)
    table[recv_head, recv_block] = num_local + torch.arange(len(recv_head), dtype=torch.int32, device=k.device)
    return FetchedPages(pages[..., : k.shape[-1]], pages[..., k.shape[-1] :], table)


def chosen_elsewhere(block_indices: Tensor, layout: RankLayout) -> Tensor:
    """bool [Hkv, num_blocks]: the blocks some query of this rank chose and another rank holds."""
    num_kv_heads, num_blocks = block_indices.shape[1], len(layout.block_owner)
    # One spare column takes the -1 of unused slots.
    marks = torch.zeros(num_kv_heads, num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    ids = block_indices.transpose(0, 1).flatten(1).long()  # [Hkv, T * n]
    marks.scatter_(1, ids.masked_fill(ids < 0, num_blocks), True)
    marks[:, layout.local_blocks] = False
    return marks[:, :num_blocks]


def exchange_bitmaps(marks: Tensor, comm: Comm) -> Tensor:
    """bool [Hkv, B] on each rank -> [P, Hkv, B], eight blocks to the byte on the wire."""
    num_blocks = marks.shape[1]
    bits = torch.nn.functional.pad(marks, (0, -num_blocks % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    shifts = torch.arange(8, device=marks.device, dtype=torch.uint8)
    packed = (bits << shifts).sum(-1, dtype=torch.uint8)  # [Hkv, B / 8]
    gathered = comm.all_gather(packed, "bitmap")
    return ((gathered[..., None] >> shifts) & 1).flatten(2)[..., :num_blocks].bool()


def _route(wanted: Tensor, table: Tensor, layout: RankLayout, comm: Comm) -> tuple[_Route, Tensor, Tensor]:
    """The page lists of both directions; also (head, block) of every page received. Waits for the device once."""
    sends, recvs = [], []
    for rank in range(comm.size):
        sends.append(wanted[rank][:, layout.local_blocks].nonzero())  # (head, local page), head by head
        recvs.append((wanted[comm.rank] & (layout.block_owner == rank)).nonzero())  # (head, block)
    send, recv = torch.cat(sends), torch.cat(recvs)
    # Local blocks ascend, so ascending local pages are ascending blocks: both sides list the same order.
    route = _Route(send[:, 0], send[:, 1], tuple(map(len, sends)), tuple(map(len, recvs)))
    return route, recv[:, 0], recv[:, 1]


class _FetchPages(torch.autograd.Function):
    """Pages of K and V side by side, packed by their owners; one all_to_all.

    forward    pages [fetched, l', Dk + Dv] = what the owners sent: their (k | v)[page, :, head]
    backward   dk, dv of the owner = the sum over ranks of the gradients of each copy, ascending rank, in fp32
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, route: _Route, layout: RankLayout, comm: Comm):
        ctx.route, ctx.comm = route, comm
        ctx.shapes, ctx.dim_k = (k.shape, v.shape), k.shape[-1]
        ctx.block_len = k.shape[0] // len(layout.local_blocks)
        packed = torch.cat([_paged(x, ctx.block_len)[route.send_page, :, route.send_head] for x in (k, v)], -1)
        return comm.all_to_all(packed, route.send_sizes, route.recv_sizes, "pages")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        route = ctx.route
        dtype = torch.promote_types(grad.dtype, torch.float32)
        grad_home = ctx.comm.all_to_all(grad.to(dtype), route.recv_sizes, route.send_sizes, "pages.grad")
        results = []
        for shape, part in zip(ctx.shapes, (grad_home[..., : ctx.dim_k], grad_home[..., ctx.dim_k :]), strict=True):
            total = torch.zeros(shape, dtype=dtype, device=grad.device)
            pages = _paged(total, ctx.block_len).transpose(1, 2)  # [pages, Hkv, l', D], a view of total
            start = 0
            for size in route.send_sizes:  # no rank asks for a page twice, so within one source nothing collides
                rows = slice(start, start + size)
                pages[route.send_page[rows], route.send_head[rows]] += part[rows]
                start += size
            results.append(total.to(grad.dtype))
        return *results, None, None, None


def _paged(x: Tensor, block_len: int) -> Tensor:
    """[T, Hkv, D] -> [pages, l', Hkv, D], a view."""
    return x.unflatten(0, (-1, block_len))
