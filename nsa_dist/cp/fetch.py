"""Which selected blocks travel, and how: bitmaps tell every owner what to send, pages move in rounds that fit a budget.

Per key-value head a rank marks the global selection blocks its queries chose and it does not hold. Bitmaps are
gathered; their set bits in ascending order are the list of pages on both sides, so no index ever travels, and every
rank knows everybody's rounds.

    owner 0 holds blocks 0 1, rank 1 marks 1 1 0 0 for head 0 and 0 1 0 0 for head 1
    rank 1 gets from rank 0  (head 0, block 0) (head 0, block 1) (head 1, block 1)
    with a budget of two pages it gets the first two in round 0 and the third in round 1
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm, Handle
from nsa_dist.cp.device import put_on
from nsa_dist.cp.layout import RankLayout
from nsa_dist.cp.options import FetchOptions as FetchOptions  # by this name in older checkpoints


@dataclass(frozen=True)
class Route:
    """One round's pages to send and to receive, each list ordered by the other rank, then head, then block.

    whole_heads     if all that is sent are whole shards of heads: the head of each in turn; else None
    """

    send_head: Tensor  # int64 [sum(send_sizes)]
    send_page: Tensor  # int64, local page
    recv_head: Tensor  # int64 [sum(recv_sizes)]
    recv_block: Tensor  # int64, global block
    send_sizes: tuple[int, ...]
    recv_sizes: tuple[int, ...]
    whole_heads: tuple[int, ...] | None = None


def chosen_elsewhere(block_indices: Tensor, layout: RankLayout) -> Tensor:
    """bool [Hkv, num_blocks]: the blocks some query of this rank chose and another rank holds."""
    num_kv_heads, num_blocks = block_indices.shape[1], len(layout.block_owner)
    # One spare column takes the -1 of unused slots.
    marks = torch.zeros(num_kv_heads, num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    ids = block_indices.transpose(0, 1).flatten(1).long()  # [Hkv, T * n]
    marks.scatter_(1, ids.masked_fill(ids < 0, num_blocks), True)
    marks.index_fill_(1, layout.local_blocks, False)  # not marks[:, ...] = False, which copies from the host
    return marks[:, :num_blocks]


def pack_bits(marks: Tensor) -> Tensor:
    """bool [Hkv, B] -> uint8 [Hkv, ceil(B / 8)], eight blocks to the byte."""
    bits = torch.nn.functional.pad(marks, (0, -marks.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    shifts = torch.arange(8, device=marks.device, dtype=torch.uint8)
    return (bits << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, num_blocks: int) -> Tensor:
    """uint8 [..., ceil(B / 8)] -> bool [..., B], the inverse of `pack_bits`."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :num_blocks].bool()


def widen_to_whole_shards(wanted: Tensor, block_owner: Tensor, fraction: float) -> Tensor:
    """Where at least `fraction` of an owner's blocks of a head are wanted, want all of them: [P, Hkv, B] -> same."""
    if fraction == 1.0:
        return wanted
    wanted = wanted.clone()
    for owner in range(wanted.shape[0]):
        held = block_owner == owner
        dense = wanted[..., held].float().mean(-1) >= fraction  # [P, Hkv]
        wanted[..., held] |= dense[..., None]
    return wanted


def plan_rounds(wanted: Tensor, layout: RankLayout, rank: int, per_round: int | None) -> list[Route]:
    """This rank's part in every round; the same number of rounds on every rank, at least one.

    wanted      bool [P, Hkv, B] on the CPU, row r being what rank r is to get
    per_round   pages that a rank gets in one round at most; None: all
    """
    lists = [_page_list(wanted[receiver], layout.block_owner) for receiver in range(len(wanted))]
    longest = max(1, *map(len, lists))
    per_round = per_round or longest
    rounds = []
    for start in range(0, longest, per_round):
        parts = [pages[start : start + per_round] for pages in lists]
        sends = [part[part[:, 0] == rank] for part in parts]
        send, recv = torch.cat(sends), parts[rank]
        rounds.append(
            Route(
                send_head=send[:, 1],
                send_page=layout.page_of_block[send[:, 2]],
                recv_head=recv[:, 1],
                recv_block=recv[:, 2],
                send_sizes=tuple(map(len, sends)),
                recv_sizes=tuple(torch.bincount(recv[:, 0], minlength=len(lists)).tolist()),
                whole_heads=_whole_heads(sends, len(layout.local_blocks)),
            )
        )
    return rounds


def _page_list(wanted: Tensor, owner: Tensor) -> Tensor:
    """int64 [pages, 3] of (owner, head, block), in that order; wanted bool [Hkv, B]."""
    head, block = wanted.nonzero(as_tuple=True)
    pages = torch.stack([owner[block], head, block], 1)
    return pages[pages[:, 0].argsort(stable=True)]


def _whole_heads(sends: list[Tensor], num_local: int) -> tuple[int, ...] | None:
    """The heads of which each rank gets all local pages, rank by rank, if nobody gets a part of one."""
    heads: list[int] = []
    for pages in sends:
        found, counts = pages[:, 1].unique_consecutive(return_counts=True)
        if not bool((counts == num_local).all()):
            return None
        heads += found.tolist()
    return tuple(heads)


def post_pages(k: Tensor, v: Tensor, route: Route, block_len: int, comm: Comm, name: str) -> Handle:
    """The pages of one round: k [T, Hkv, Dk], v [T, Hkv, Dv] of the owners -> [received, l', Dk + Dv]."""
    packed = k.new_empty(len(route.send_page), block_len, k.shape[2] + v.shape[2])
    parts = (k, packed[..., : k.shape[2]]), (v, packed[..., k.shape[2] :])
    if route.whole_heads is not None:
        for x, part in parts:
            for head, shard in zip(route.whole_heads, part.split(len(k) // block_len), strict=False):
                shard.copy_(_paged(x[:, head], block_len))
    else:
        heads, pages = put_on(k.device, route.send_head), put_on(k.device, route.send_page)
        for x, part in parts:
            part.copy_(_paged(x, block_len)[pages, :, heads])
    return comm.post_all_to_all(packed, route.send_sizes, route.recv_sizes, "pages", name)


def post_page_gradients(grad: Tensor, route: Route, comm: Comm, name: str) -> Handle:
    """The dual of `post_pages`: what every receiver found for its copies [received, l', Dk + Dv] goes to the owners."""
    return comm.post_all_to_all(grad, route.recv_sizes, route.send_sizes, "pages.grad", name)


def add_page_gradients(home: Tensor, dk: Tensor, dv: Tensor, route: Route, block_len: int) -> None:
    """Add what came home to the owner's dk and dv, sources in ascending rank order; all in fp32 or better."""
    head, page = put_on(dk.device, route.send_head), put_on(dk.device, route.send_page)
    for total, part in ((dk, home[..., : dk.shape[-1]]), (dv, home[..., dk.shape[-1] :])):
        pages = _paged(total, block_len).transpose(1, 2)  # [pages, Hkv, l', D], a view of total
        start = 0
        for size in route.send_sizes:  # no rank asks for a page twice, so within one source nothing collides
            rows = slice(start, start + size)
            pages[page[rows], head[rows]] += part[rows]
            start += size


def _paged(x: Tensor, block_len: int) -> Tensor:
    """[T, ...] -> [pages, l', ...], a view."""
    return x.unflatten(0, (-1, block_len))
