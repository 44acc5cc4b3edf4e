"""One rank's part in every round: sizes on the host, worked out of a few numbers, and lists of pages on the device."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nsa_dist.cp.sent.domains import Domains

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Passed:
    """What goes on inside a domain, round by round, lane by lane: int64, of a list of L places that many come first.

    send    [D * L]: lane * L + place, in the order in which this rank passes pages on
    recv    [L]: places, in the order in which the pages that it chose come
    row     [L]: of a page of this rank's share, its row in the share of its round
    entry   [L]: of [P, h, blocks of a rank] the one that stands at each place
    """

    send: Tensor
    recv: Tensor
    row: Tensor
    entry: Tensor
    num_outside: int  # places of owners outside the domain, which come first


@dataclass(frozen=True)
class Entries:
    """What the entries of [P, h, blocks of a rank] are, int32 each, on the device."""

    head: Tensor
    page: Tensor  # on the owner
    block: Tensor  # global


@dataclass(frozen=True)
class Lists:
    """On the device: of each list as many entries are meant as the numbers say."""

    sent: Tensor  # int64 [G * h * blocks of a rank]: own blocks that domains chose, in the order in which they go
    got: (
        Tensor | Passed
    )  # int64 [P * h * blocks of a rank]: entries that this rank chose, in the order in which they come
    entries: Entries


@dataclass(frozen=True)
class PassedOn:
    """What a rank passes on inside its domain in one round: for each lane pages of its share, then own pages.

    rows of what is sent, [sum(send_sizes)] in all: `shared_rows` are rows `shared` of the share, the others own pages
    """

    send_sizes: Sizes  # by rank of the group, 0 outside the domain
    recv_sizes: Sizes
    shared_sizes: Sizes  # by lane
    own_sizes: Sizes
    shared_rows: Tensor  # int32
    shared: Tensor
    own_rows: Tensor
    own_head: Tensor
    own_page: Tensor


@dataclass(frozen=True)
class Route:
    """One round's pages to send and to receive, each list ordered by the other rank, then head, then block.

    recv_head and recv_block are of the pages that this rank attends to, in the order in which they come last.
    whole_heads     if all that is sent are whole shards of heads: the head of each in turn; else None
    """

    send_head: Tensor  # int32 [sum(send_sizes)]
    send_page: Tensor  # int32, local page
    recv_head: Tensor  # int32
    recv_block: Tensor  # int32, global block
    send_sizes: Sizes
    recv_sizes: Sizes
    whole_heads: Sizes | None = None
    passed: PassedOn | None = None


@dataclass(frozen=True)
class Told:
    """The numbers of `lists.PageLists`, int64 on the CPU. G domains; a domain's list is that of its union."""

    domains: Domains
    num_heads: int
    num_own: int  # blocks of a rank
    per_round: int
    totals: Tensor  # [G]: pages in each domain's list, 0 where there is one round anyway
    of_owner: Tensor  # [P]: pages of the own domain's list that each owner outside holds
    begin: Tensor  # [G]: where this rank's pages begin in each domain's list
    sent: Tensor  # [G * h]: its pages in it by head
    chosen: Tensor  # [h]: remote blocks that its queries chose
    passed: tuple[Tensor, ...] = ()  # by round and lane: passed on of the share, of own pages; got

    @cached_property
    def num_rounds(self) -> int:
        """The same on every rank, at least one."""
        return max(1, -(-int(self.totals.max()) // self.per_round))

    def routes(self, lists: Lists) -> list[Route]:
        """Of every round."""
        entries = lists.entries
        send_sizes, recv_sizes = self._sizes()
        page = lists.sent[: sum(map(sum, send_sizes))]  # of [G, h, blocks of a rank], as good as of the first G ranks
        if isinstance(lists.got, Passed):
            passed, got, got_sizes = self._passed(lists.got, entries)
        else:
            passed, got_sizes = [None] * len(recv_sizes), list(map(sum, recv_sizes))
            got = lists.got[: sum(got_sizes)]
        found = [
            *(x.index_select(0, page).split(list(map(sum, send_sizes))) for x in (entries.head, entries.page)),
            *(x.index_select(0, got).split(got_sizes) for x in (entries.head, entries.block)),
        ]
        whole = map(self._whole_heads, range(len(passed)))
        parts = zip(*found, map(tuple, send_sizes), map(tuple, recv_sizes), whole, passed, strict=True)
        return [Route(*part) for part in parts]

    def _sizes(self) -> tuple[list[list[int]], list[list[int]]]:
        """Pages that this rank sends in each round to each rank, and gets from each."""
        where, sent = self.domains, self.sent.view(-1, self.num_heads).sum(1)
        if where.size == 1 and self.num_rounds == 1:
            return [sent.tolist()], [self.of_owner.tolist()]
        begin = self.of_owner.cumsum(0) - self.of_owner
        to_ranks = self._in_rounds(self.begin, sent).flatten(1)  # [rounds, P]
        return to_ranks.tolist(), self._in_rounds(begin, self.of_owner)[:, :, where.lane].tolist()

    def _in_rounds(self, begin: Tensor, count: Tensor) -> Tensor:
        """[rounds, n, D]: of the runs of a list from begin [n] on, the pages of each round and lane."""
        start = torch.arange(self.num_rounds)[:, None] * self.per_round
        first = torch.maximum(begin, start)
        stop = torch.maximum(torch.minimum(begin + count, start + self.per_round), first)
        # Of 0, 1, ..., x - 1 there are (x + D - 1 - lane) // D that lane fetches.
        from_lane = self.domains.size - 1 - torch.arange(self.domains.size)
        first, stop = ((x[..., None] + from_lane) // self.domains.size for x in (first, stop))
        return stop - first

    def _whole_heads(self, number: int) -> Sizes | None:
        """The heads of which each rank gets all local pages in a round, rank by rank, if nobody gets a part of one."""
        sent = self.sent.view(-1, self.num_heads)
        if self.domains.size > 1 or not bool(((sent == 0) | (sent == self.num_own)).all()):
            return None
        first, heads = self.begin[:, None] + sent.cumsum(1) - sent, []
        start, stop = number * self.per_round, (number + 1) * self.per_round
        for rank, head in sent.nonzero().tolist():
            a = int(first[rank, head])
            if start <= a and a + self.num_own <= stop:
                heads.append(head)
            elif a < stop and start < a + self.num_own:
                return None
        return tuple(heads)

    # --- Inside the domain -----------------------------------------------------------------------------------------

    def _passed(self, known: Passed, entries: Entries) -> tuple[list[PassedOn | None], Tensor, list[int]]:
        """What is passed on in each round; the entries that come, and how many in each round."""
        where = self.domains
        shared, own, got = (x.view(-1, where.size)[: self.num_rounds] for x in self.passed)
        counts, got_sizes = (shared + own).sum(1).tolist(), got.sum(1).tolist()
        place = known.send[: sum(counts)] % len(known.entry)
        found: list[PassedOn | None] = [
            self._passed_on(known, entries, places, *sizes)
            for places, *sizes in zip(
                place.split(counts), shared.tolist(), own.tolist(), got.tolist(), strict=True
            )
        ]  # fmt: skip
        return found, known.entry.index_select(0, known.recv[: sum(got_sizes)]), got_sizes

    def _passed_on(
        self, known: Passed, entries: Entries, places: Tensor, shared: list[int], own: list[int], got: list[int]
    ) -> PassedOn:
        num_shared = sum(shared)
        rows = (places >= known.num_outside).to(torch.uint8).argsort(stable=True)  # those of the share, then own pages
        entry = known.entry.index_select(0, places.index_select(0, rows[num_shared:]))
        return PassedOn(
            send_sizes=self._of_group([a + b for a, b in zip(shared, own, strict=True)]),
            recv_sizes=self._of_group(got),
            shared_sizes=tuple(shared),
            own_sizes=tuple(own),
            shared_rows=rows[:num_shared].int(),
            shared=known.row.index_select(0, places.index_select(0, rows[:num_shared])).int(),
            own_rows=rows[num_shared:].int(),
            own_head=entries.head.index_select(0, entry),
            own_page=entries.page.index_select(0, entry),
        )

    def _of_group(self, sizes: list[int]) -> Sizes:
        """Of the lanes of the own domain, by rank of the group."""
        before = self.domains.ranks.start
        return (*(0,) * before, *sizes, *(0,) * (self.domains.num_ranks - before - len(sizes)))


def pages_passed_on(rounds: list[list[Route]], rank: int) -> tuple[int, int]:
    """Pages that this rank fetched as its share, and those that others passed on to it."""
    routes = [route for of_stage in rounds for route in of_stage]
    passed = [route.passed.recv_sizes for route in routes if route.passed is not None]
    return sum(sum(route.recv_sizes) for route in routes), sum(sum(sizes) - sizes[rank] for sizes in passed)
