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

# How fast an H200 packs what it sends, 32 KiB of K or V at a time: page by page, and shards as they lie
# (docs/decisions/fetch.md).
GATHER_BYTES_PER_S, COPY_BYTES_PER_S = 331e9, 980e9


@dataclass(frozen=True)
class FetchOptions:
    """How the remote blocks of the selected branch are moved. Every rank of a group must use the same.

    Raises ValueError on a budget or a number of groups below 1 or a fraction outside of (0, 1].
    """

    kv_fetch_budget_bytes: int | None = None  # pages held at once on a rank; None: those of two head groups
    whole_shard_fraction: float = 1.0  # of an (owner, kv head)'s blocks chosen: from here on all of them are sent
    keep_pages: bool = False  # keep fetched pages for backward instead of fetching them again
    head_groups: int = 4  # kv heads travel in so many groups, each under the computation of others; 1: all at once

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
        if self.head_groups < 1:
            raise ValueError(
                f"head_groups={self.head_groups} must be at least 1: the kv heads travel in so many groups; pass 1 to "
                f"move all of them at once, with nothing to hide it"
            )

    @classmethod
    def for_link(
        cls,
        link_bytes_per_s: float,
        gather_bytes_per_s: float = GATHER_BYTES_PER_S,
        copy_bytes_per_s: float = COPY_BYTES_PER_S,
        **others,
    ) -> "FetchOptions":
        """Options whose threshold between fetch and whole shard is where both take the same time.

        A byte that was chosen is gathered page by page, 1 / gather, and sent, 1 / link; a byte of a whole shard is
        copied as it lies, 1 / copy, and sent. So a shard of which the fraction u was chosen is better sent whole from

            u = (1 / link + 1 / copy) / (1 / link + 1 / gather)

        on: 1 where gathering is no slower than copying or where the link is all that counts. link: what one rank sends
        in a second, to be measured or looked up; the others are an H200's. `others` are further fields of the options.
        """
        rates = {"link": link_bytes_per_s, "gather": gather_bytes_per_s, "copy": copy_bytes_per_s}
        if min(rates.values()) <= 0:
            raise ValueError(
                f"rates of {rates} bytes per second must be positive, because times are compared; pass measured ones"
            )
        threshold = (1 / link_bytes_per_s + 1 / copy_bytes_per_s) / (1 / link_bytes_per_s + 1 / gather_bytes_per_s)
        return cls(whole_shard_fraction=min(1.0, threshold), **others)

    def round_pages(self, page_bytes: int) -> int | None:
        """Pages of one round: half the budget, for the next round travels while this one is in use; None: no bound."""
        if self.kv_fetch_budget_bytes is None:
            return None
        return max(1, self.kv_fetch_budget_bytes // page_bytes // 2)

    def halves_queries(self, num_kv_heads: int) -> bool:
        """Whether the queries of a rank's only kv head go in two halves, so that one's fetch hides under the other.

        Both halves' pages are held until the end, so not under a budget; pages that are kept are not cut in two.
        """
        bounded = self.kv_fetch_budget_bytes is not None or self.keep_pages
        return num_kv_heads == 1 and self.head_groups > 1 and not bounded

    def fetches_ahead(self, page_bytes: int) -> bool:
        """Whether two rounds fit in the budget. If not, each is fetched only when the one before is done with."""
        return self.kv_fetch_budget_bytes is None or self.kv_fetch_budget_bytes >= 2 * page_bytes


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
