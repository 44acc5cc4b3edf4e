"""The pages of a stage, listed on the device from everybody's bitmaps; the host is told only how many go where.

The bitmaps of a domain's ranks are united. The pages of a union, by owner, head and block, those of owners outside the
domain before those of its own ranks, are a list:

    page p      travels in round p // R
    p outside   is fetched by lane p % D of the domain, its share, and passed on from there
    p inside    is passed on by its owner
    passed on   to the ranks of the domain that chose it

so every page enters a domain once, shares differ by a page at most, and all of it follows from the bitmaps, which every
rank has. With D = 1 a share is what the rank chose, and nothing is passed on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.cp.device import CopyToHost, put_on
from nsa_dist.cp.fetch import widen_to_whole_shards
from nsa_dist.cp.layout import RankLayout
from nsa_dist.cp.sent.domains import Domains
from nsa_dist.cp.sent.routes import Entries, Lists, Passed, Route, Told


@dataclass(frozen=True)
class OwnedBits:
    """Where in a bitmap the blocks of each rank stand, [P, T // l'] each, on the device."""

    block: Tensor  # int64
    byte: Tensor  # int64
    shift: Tensor  # uint8


def owned_bits(layout: RankLayout) -> OwnedBits:
    """Those of a layout, kept with it."""
    if "owned bits" not in layout.kept:
        block = layout.block_owner.argsort(stable=True).view(layout.host.plan.cp_size, -1)
        tables = block, block >> 3, (block & 7).to(torch.uint8)
        layout.kept["owned bits"] = OwnedBits(*(put_on(layout.position.device, x) for x in tables))
    return layout.kept["owned bits"]


class PageLists:
    """What the ranks of a stage send each other: `routes()` waits for the numbers; the lists stay on the device.

    bits        uint8 [P, h, bytes] on the device: what every rank's queries chose (`fetch.pack_bits`)
    per_round   pages of a union in one round; None: all
    fraction    `FetchOptions.whole_shard_fraction`, for domains of one rank
    without     bitmaps of what is here already
    """

    def __init__(
        self, bits: Tensor, layout: RankLayout, domains: Domains, per_round: int | None, fraction: float = 1.0,
        without: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._domains, self._fraction, self._per_round = domains, fraction, per_round
        self._owned = owned_bits(layout)
        self.num_heads, self.num_own = bits.shape[1], self._owned.block.shape[1]
        self.num_listed = domains.num_ranks * self.num_heads * self.num_own
        self.per_round = per_round or self.num_listed
        unions = _united(bits, domains.size), None if without is None else _united(without, domains.size)
        numbers, sent, union = self._first_hop(*unions)
        entries = _entries(layout, self._owned, self.num_heads)
        if domains.size == 1:
            plain = fraction == 1.0 and without is None
            numbers.append(union.sum((0, 2)) if plain else _bits_set(bits[domains.rank]))
            self._lists = Lists(sent, _listed(union.flatten()), entries)
        else:
            more, passed = self._second_hop(bits, union)
            numbers += [_bits_set(bits[domains.rank]), *more]
            self._lists = Lists(sent, passed, entries)
        self._sizes = [len(x) for x in numbers]
        self._copy = CopyToHost(torch.cat(numbers))

    def told(self) -> Told:
        """The numbers; the host waits for them if they have not come."""
        parts = self._copy.wait().split(self._sizes)
        totals, of_owner, begin, sent, chosen, *passed = parts
        return Told(
            self._domains, self.num_heads, self.num_own, self.per_round, totals, of_owner, begin, sent, chosen,
            tuple(passed),
        )  # fmt: skip

    def routes(self) -> list[Route]:
        """Of every round."""
        return self.told().routes(self._lists)

    # --- Between domains -----------------------------------------------------------------------------------------

    def _first_hop(self, unions: Tensor, without: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
        """Four sorts of numbers (`Told`), the list of what this rank sends, and what its domain chose: [P, h, own]."""
        where = self._domains
        mine = self._wanted(unions, without, where.rank).squeeze(1)  # [G, h, own]: own blocks that each domain chose
        union = self._wanted(unions[where.own], None if without is None else without[where.own])  # [P, h, own]
        if self._per_round is None and where.size == 1:  # nobody need know where it stands in others' lists
            none = torch.zeros(where.count, dtype=torch.int64, device=unions.device)
            return [none, union.sum((1, 2)), none, mine.sum(2).flatten()], _listed(mine.flatten()), union
        domain = torch.arange(where.count, device=unions.device)[:, None]
        is_inside = torch.arange(where.num_ranks, device=unions.device) // where.size == domain  # [G, P]
        of_owner = self._wanted(unions, without).sum((2, 3))  # [G, P]
        outside = of_owner.masked_fill(is_inside, 0)
        begin = (outside.cumsum(1) - outside)[:, where.rank]
        mine = mine & (domain != where.own)[..., None]
        place = mine.flatten(1).cumsum(1) - 1 + begin[:, None]
        rank = domain * where.size + place % where.size
        key = place.div(self.per_round, rounding_mode="floor") * where.num_ranks + rank
        numbers = [of_owner.sum(1), outside[where.own], begin, mine.sum(2).flatten()]
        return numbers, _listed(mine.flatten(), key.flatten()), union

    def _wanted(self, unions: Tensor, without: Tensor | None, owner: int | None = None) -> Tensor:
        """bool [..., P or 1, h, own] of bitmaps [..., h, bytes]."""
        rows = slice(None) if owner is None else slice(owner, owner + 1)
        wanted = widen_to_whole_shards(_of_owners(unions, self._owned, rows), self._fraction)
        if without is None:
            return wanted
        return wanted & ~widen_to_whole_shards(_of_owners(without, self._owned, rows), self._fraction)

    # --- Inside the domain ---------------------------------------------------------------------------------------

    def _second_hop(self, bits: Tensor, union: Tensor) -> tuple[list[Tensor], Passed]:
        """By round and lane, how many this rank passes on of its share and of its own, and gets; the lists of them."""
        where, device = self._domains, bits.device
        ranks = torch.arange(where.num_ranks, device=device)
        owners = (ranks // where.size == where.own).to(torch.uint8).argsort(stable=True)  # the domain's own come last
        per_owner = self.num_heads * self.num_own
        num_outside = (where.num_ranks - where.size) * per_owner
        union = union.index_select(0, owners).flatten()  # [L]
        chosen = _of_owners(bits[where.ranks], self._owned).index_select(1, owners).flatten(1)  # [D, L]
        place = union.cumsum(0) - 1
        number = place.div(self.per_round, rounding_mode="floor")
        first = number * self.per_round
        entry = torch.arange(len(union), device=device)
        outside = entry < num_outside
        source = torch.where(outside, place % where.size, entry // per_owner - where.num_ranks + where.size)
        lane = torch.arange(where.size, device=device)[:, None]
        send, send_key = chosen & (source == where.lane), number * where.size + lane
        recv, recv_key = chosen[where.lane], number * where.size + source
        passed = Passed(
            send=_listed(send.flatten(), send_key.flatten()),
            recv=_listed(recv, recv_key),
            row=(place - first - (where.lane - first) % where.size) // where.size,
            entry=owners[entry // per_owner] * per_owner + entry % per_owner,
            num_outside=num_outside,
        )
        most = -(-self.num_listed // self.per_round) * where.size
        counted = (send & outside, send_key), (send & ~outside, send_key), (recv, recv_key)
        counts = [_counted(mask, key, most) for mask, key in counted]
        return counts, passed


def _entries(layout: RankLayout, owned: OwnedBits, num_heads: int) -> Entries:
    """Those of stages of so many heads, kept with the layout."""
    key = ("entries", num_heads)
    if key not in layout.kept:
        num_ranks, num_own = owned.block.shape
        head = torch.arange(num_heads, dtype=torch.int32)[:, None].expand(num_ranks, -1, num_own)
        page = torch.arange(num_own, dtype=torch.int32).expand(num_ranks, num_heads, -1)
        head, page = (put_on(owned.block.device, x.flatten()) for x in (head, page))
        block = owned.block.to(torch.int32)[:, None].expand(-1, num_heads, -1).flatten()
        layout.kept[key] = Entries(head, page, block)
    return layout.kept[key]


def _united(bits: Tensor, size: int) -> Tensor:
    """uint8 [P, h, bytes] -> [P / size, h, bytes]: what somebody of each domain chose."""
    lanes = bits.unflatten(0, (-1, size)).unbind(1)
    union = lanes[0]
    for lane in lanes[1:]:
        union = union | lane
    return union


def _of_owners(bits: Tensor, owned: OwnedBits, rows: slice = slice(None)) -> Tensor:
    """bool [..., P, h, own] of bitmaps uint8 [..., h, bytes], or of some owners."""
    byte, shift = owned.byte[rows], owned.shift[rows]
    found = (bits.index_select(-1, byte.flatten()) >> shift.flatten()) & 1
    return found.view(torch.bool).unflatten(-1, byte.shape).transpose(-2, -3)


def _bits_set(bits: Tensor) -> Tensor:
    """int64 [h] of uint8 [h, bytes]."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).sum((1, 2))


def _listed(mask: Tensor, key: Tensor | None = None) -> Tensor:
    """int64, as long as mask [n]: first the places where it is true, by their key, or ascending; then any."""
    if key is not None:
        return torch.where(mask, key, torch.iinfo(torch.int64).max).argsort(stable=True)
    place = torch.where(mask, mask.cumsum(0) - 1, len(mask))
    listed = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    return listed.scatter_(0, place, torch.arange(len(mask), device=mask.device))[:-1]


def _counted(mask: Tensor, key: Tensor, num_keys: int) -> Tensor:
    """int64 [num_keys]: how often each is the key of something that is true."""
    mask, key = torch.broadcast_tensors(mask, key)
    counts = torch.zeros(num_keys + 1, dtype=torch.int64, device=mask.device)
    ones = torch.ones(1, dtype=torch.int64, device=mask.device).expand(mask.numel())
    return counts.index_add_(0, torch.where(mask, key, num_keys).flatten(), ones)[:-1]
