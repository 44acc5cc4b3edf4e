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

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.layout import RankLayout


@dataclass(frozen=True)
class FetchOptions:
    """How the remote blocks of the selected branch are moved. Every rank of a group must use the same.

    Raises ValueError on a budget below 1 byte or a fraction outside of (0, 1].
    """

    kv_fetch_budget_bytes: int | None = None  # pages held at once on a rank; None: as many as are chosen, one round
    whole_shard_fraction: float = 1.0  # of an (owner, kv head)'s blocks chosen: from here on all of them are sent
    keep_pages: bool = False  # keep fetched pages for backward instead of fetching them again

    def __post_init__(self) -> None:
        if self.kv_fetch_budget_bytes is not None and self.kv_fetch_budget_bytes < 1:
            raise ValueError(
                f"kv_fetch_budget_bytes={self.kv_fetch_budget_bytes} must be positive: a round moves at least one "
                f"page; pass None for no bound"
            )
        if not 0 < self.whole_shard_fraction <= 1:
            raise ValueError(
                f"whole_shard_fraction={self.whole_shard_fraction} is a fraction of an owner's blocks and must lie in "
                f"(0, 1]; 1 sends only what was chosen"
            )


@dataclass(frozen=True)
class Route:
    """One round's pages to send and to receive, each list ordered by the other rank, then head, then block."""

    send_head: Tensor  # int64 [sum(send_sizes)]
    send_page: Tensor  # int64, local page
    recv_head: Tensor  # int64 [sum(recv_sizes)]
    recv_block: Tensor  # int64, global block
    send_sizes: tuple[int, ...]
    recv_sizes: tuple[int, ...]


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


def plan_rounds(wanted: Tensor, layout: RankLayout, rank: int, page_bytes: int, options: FetchOptions) -> list[Route]:
    """This rank's part in every round; the same number of rounds on every rank, at least one.

    wanted      bool [P, Hkv, B] on the CPU, row r being what rank r lacks; page_bytes of one page's keys and values
    """
    owner = layout.block_owner.cpu()
    page_of_block = torch.full_like(owner, -1)
    page_of_block[layout.local_blocks.cpu()] = torch.arange(len(layout.local_blocks))
    wanted = widen_to_whole_shards(wanted, owner, options.whole_shard_fraction)
    lists = [_page_list(wanted[receiver], owner) for receiver in range(len(wanted))]
    longest = max(len(pages) for pages in lists)
    budget = options.kv_fetch_budget_bytes
    per_round = max(1, longest if budget is None else budget // page_bytes)
    rounds = []
    for start in range(0, max(1, longest), per_round):
        parts = [pages[start : start + per_round] for pages in lists]
        sends = [part[part[:, 0] == rank] for part in parts]
        send, recv = torch.cat(sends), parts[rank]
        rounds.append(
            Route(
                send_head=send[:, 1],
                send_page=page_of_block[send[:, 2]],
                recv_head=recv[:, 1],
                recv_block=recv[:, 2],
                send_sizes=tuple(map(len, sends)),
                recv_sizes=tuple(torch.bincount(recv[:, 0], minlength=len(lists)).tolist()),
            )
        )
    return rounds


def _page_list(wanted: Tensor, owner: Tensor) -> Tensor:
    """int64 [pages, 3] of (owner, head, block), in that order; wanted bool [Hkv, B]."""
    head, block = wanted.nonzero(as_tuple=True)
    pages = torch.stack([owner[block], head, block], 1)
    return pages[pages[:, 0].argsort(stable=True)]


def send_pages(k: Tensor, v: Tensor, route: Route, block_len: int, comm: Comm) -> Tensor:
    """The pages of one round: k [T, Hkv, Dk], v [T, Hkv, Dv] of the owners -> [received, l', Dk + Dv]."""
    head, page = route.send_head.to(k.device), route.send_page.to(k.device)
    packed = torch.cat([_paged(x, block_len)[page, :, head] for x in (k, v)], -1)
    return comm.all_to_all(packed, route.send_sizes, route.recv_sizes, "pages")


def return_gradients(grad: Tensor, dk: Tensor, dv: Tensor, route: Route, block_len: int, comm: Comm) -> None:
    """The dual of `send_pages`: what every receiver found for its copies is added to the owners' dk and dv.

    grad [received, l', Dk + Dv] and dk, dv are fp32 or better; sources are added in ascending rank order.
    """
    home = comm.all_to_all(grad, route.recv_sizes, route.send_sizes, "pages.grad")
    head, page = route.send_head.to(dk.device), route.send_page.to(dk.device)
    for total, part in ((dk, home[..., : dk.shape[-1]]), (dv, home[..., dk.shape[-1] :])):
        pages = _paged(total, block_len).transpose(1, 2)  # [pages, Hkv, l', D], a view of total
        start = 0
        for size in route.send_sizes:  # no rank asks for a page twice, so within one source nothing collides
            rows = slice(start, start + size)
            pages[page[rows], head[rows]] += part[rows]
            start += size


def _paged(x: Tensor, block_len: int) -> Tensor:
    """[T, Hkv, D] -> [pages, l', Hkv, D], a view."""
    return x.unflatten(0, (-1, block_len))
