"""First chunks, sharded by a plan: which tokens each rank of the cache is to have, and how they get there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.device import put_on
from nsa_dist.cp.plan import ShardPlan, runs
from nsa_dist.inference.cache import SequenceState
from nsa_dist.inference.storage import CacheShape, Pair


class Rows(NamedTuple):
    """W tokens, or pages, of some sequences; one may be there twice."""

    sequence: Tensor  # int64 [W]
    place: Tensor  # int64 [W], in the sequence

    def where(self, use: Tensor) -> "Rows":
        return Rows(self.sequence[use], self.place[use])


class Chunks:
    """First chunks, which begin at the beginning of their sequences, and the pages that are reserved for them."""

    def __init__(self, states: Sequence[SequenceState], plan: ShardPlan, shape: CacheShape) -> None:
        self.plan, self.shape, self.cfg = plan, shape, shape.cfg
        self.length = torch.tensor([stop - start for start, stop in pairwise(plan.cu_seqlens)])
        self.num_pages = torch.tensor([len(state.pages) for state in states])
        self.page_ids = torch.cat([state.pages for state in states])
        self.ring = torch.tensor([state.ring for state in states])

    def pages(self, rank: int) -> Rows:
        """Those of a rank."""
        sequence = torch.arange(len(self.num_pages)).repeat_interleave(self.num_pages)
        place = runs(torch.zeros_like(self.num_pages), self.num_pages)
        return Rows(sequence, place).where(self.page_ids % self.plan.cp_size == rank)

    def of_pages(self, pages: Rows, more: int = 0) -> Rows:
        """The tokens of pages, and `more` on both sides of each."""
        count = torch.full_like(pages.place, self.cfg.slc_block_len + 2 * more)
        start = pages.place * self.cfg.slc_block_len - more
        return Rows(pages.sequence.repeat_interleave(count), runs(start, count))

    def last(self, count: int) -> Rows:
        """The last tokens of each sequence, `count` at most."""
        kept = self.length.clamp(max=count)
        return Rows(torch.arange(len(kept)).repeat_interleave(kept), runs(self.length - kept, kept))

    def exist(self, tokens: Rows) -> Tensor:
        """bool [W]: whether they are tokens of their sequence."""
        return (tokens.place >= 0) & (tokens.place < self.length[tokens.sequence])

    def page_id(self, pages: Rows) -> Tensor:
        """Ids of `PagePool`; of pages there are not, any."""
        first = self.num_pages.cumsum(0) - self.num_pages
        return self.page_ids[(first[pages.sequence] + pages.place).clamp(max=len(self.page_ids) - 1)]

    def blocks_of(self, pages: Rows, each: int) -> Rows:
        """The first `each` compressed blocks that share cells with each of J pages, J * each in order; some are none.

        The first l'/d of them lie in the page.
        """
        left = self.cfg.cmp_block_len // self.cfg.cmp_stride - 1
        count = torch.full_like(pages.place, each)
        return Rows(pages.sequence.repeat_interleave(count), runs(pages.place * self.shape.cmp_per_page - left, count))

    def are_whole(self, blocks: Rows) -> Tensor:
        """bool: whether they are compressed blocks of their sequence."""
        last = blocks.place * self.cfg.cmp_stride + self.cfg.cmp_block_len
        return (blocks.place >= 0) & (last <= self.length[blocks.sequence])


@dataclass(frozen=True)
class Moves:
    """How each rank comes by the tokens that it wants: one all-to-all of rows of the plan's shards."""

    send_rows: Tensor  # int64, by destination
    send_sizes: list[int]
    recv_sizes: list[int]
    most_sent: int  # rows of the rank that sends most
    order: Tensor  # int64: places of the received rows, which come by source

    @classmethod
    def of(cls, chunks: Chunks, wanted: Callable[[int], Rows], rank: int, device: torch.device) -> "Moves":
        """Of the tokens `wanted(rank)` of every rank, for this one."""
        plan, starts = chunks.plan, torch.tensor(chunks.plan.stream_starts)
        sent, by_source, received = [], [], torch.empty(0, dtype=torch.int64)
        for destination in range(plan.cp_size):
            tokens = wanted(destination)
            source, row = plan.owner(starts[tokens.sequence] + tokens.place)
            sent.append(row[source == rank])
            by_source.append(torch.bincount(source, minlength=plan.cp_size))
            if destination == rank:
                received = source
        return cls(
            send_rows=put_on(device, torch.cat(sent)),
            send_sizes=list(map(len, sent)),
            recv_sizes=by_source[rank].tolist(),
            most_sent=int(torch.stack(by_source).sum(0).max()),
            order=put_on(device, received.argsort(stable=True)),
        )

    def run(self, pair: Pair, comm: Comm) -> Pair:
        """Keys and values of this rank's shard [T, Hkv, D] -> those that it wants, [W, Hkv, D]."""
        sent = torch.cat([x.index_select(0, self.send_rows) for x in pair], -1)
        came = comm.post_all_to_all(sent, self.send_sizes, self.recv_sizes, "tokens", most_sent=self.most_sent).wait()
        rows = torch.empty_like(came).index_copy_(0, self.order, came)
        return Pair(*rows.split([x.shape[-1] for x in pair], -1))
