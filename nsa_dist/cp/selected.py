"""Selected attention over ranks: fetch what was chosen, attend, merge rounds; backward fetches again and sends home.

Forward, for the stages 0, 1, ... of `call.forward_stages`; a bitmap tells every owner what to send, the device lists
the pages, and how many go where comes to the host while the device works on the next stage:

    compress(h), post_bitmap(h)     post_fetch(h) once compress(h + 1) is queued     attend(h) after that
    pages held: those of stage h in use and those of h + 1 on their way

Backward knows its routes, so it posts the fetch of a round before it works on the one before, and waits for what it
sent home a round later. With one round (the usual case) nothing is merged, and the result is bit for bit that of one
rank. Memory is the rank's own tokens plus `FetchOptions.kv_fetch_budget_bytes`, whatever the selection does.
"""

import torch
from torch import Tensor

from nsa_dist.cp.call import Call, Stage
from nsa_dist.cp.comm import Handle
from nsa_dist.cp.device import Side
from nsa_dist.cp.fetch import chosen_elsewhere, pack_bits
from nsa_dist.cp.pages import Fetched, only_here, page_arguments, page_table, round_name
from nsa_dist.cp.sent.lists import PageLists
from nsa_dist.cp.sent.routes import Route, pages_passed_on
from nsa_dist.cp.sent.travel import post_pages


class SelectedForward:
    """The selected branch of one forward; k [T, Hkv, Dk], v [T, Hkv, Dv] are the rank's own."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, stages: list[Stage], call: Call):
        self._q, self._k, self._v, self._call = q, k, v, call
        self._alone = call.comm.size == 1
        self._halves = len(stages) > 1 and stages[0].kv_heads == stages[1].kv_heads
        self._page_bytes = call.cfg.slc_block_len * (k.shape[2] + v.shape[2]) * k.element_size()
        self._domains = call.domains
        self._ahead = call.fetch.fetches_ahead(self._page_bytes, self._domains.size)
        self._side = Side(q.device)
        self._bitmaps: list[Handle] = []
        self._bits: list[Tensor] = []  # of a stage, of every rank
        self._chosen: list[Tensor] = []  # int64 [h] a stage: remote blocks that this rank's queries chose
        self._whole: PageLists | None = None  # of both halves
        self._rounds: list[list[Route]] = []
        self._under_way: dict[tuple[int, int], Handle] = {}
        self._here: list[Fetched] = []
        self.kept: list[Tensor] = []  # pages of every stage and round, if FetchOptions.keep_pages

    def post_bitmap(self, block_indices: Tensor) -> None:
        """Tell all ranks what the queries of the next stage chose, block_indices [rows, h, n]."""
        if self._alone:
            return
        self._side.follow()
        with self._side.entered():
            marks = pack_bits(chosen_elsewhere(block_indices, self._call.layout))
            self._bitmaps.append(self._call.comm.post_all_gather(marks, "bitmap", f"bitmap[{len(self._bitmaps)}]"))

    def post_fetch(self, stage: Stage) -> None:
        """List what all ranks chose, whose bitmaps have come meanwhile, and start the first round."""
        if self._alone:
            return
        with self._side.entered():
            self._bits.append(self._bitmaps[stage.number].wait())
            if self._halves and stage.number == 1:
                lists = self._listed(self._bits[1] | self._bits[0], without=self._bits[0])
                self._whole = self._listed(self._bits[0] | self._bits[1])
            else:
                lists = self._listed(self._bits[stage.number])
            self._chosen.append(lists.told().chosen)
            self._rounds.append(lists.routes())
        if self._ahead:
            self._post_round(stage, 0)

    def attend(self, stage: Stage, block_indices: Tensor) -> tuple[Tensor, Tensor]:
        """out [rows, Hq of the stage, Dv] and softmax_lse of one stage, its rounds merged."""
        if self._alone:
            with self._call.comm.computing(round_name("slc", stage, 0), "slc"):
                return self._attend_here(stage, block_indices, first=True, all_here=True)
        rounds, result = len(self._rounds[stage.number]), None
        for number in range(rounds):
            self._receive(stage, number)
            with self._call.comm.computing(round_name("slc", stage, number), "slc"):
                part = self._attend_here(stage, block_indices, first=number == 0, all_here=rounds == 1)
                result = part if result is None else self._call.ops.merge(*result, *part)
            if number + 1 < rounds:
                self.release()
        assert result is not None
        return result

    def release(self) -> None:
        """Free the pages of the last round; a first half's stay for the second."""
        if self._alone:
            return
        if self._halves and len(self._here) == 1:
            return
        self._side.follow()
        self._here = []

    def finish(self) -> list[list[Route]]:
        """The rounds of every head group, for backward; counts u."""
        if self._alone:
            return [[]]
        if self._whole is not None:
            self._chosen, self._rounds = [self._whole.told().chosen], [self._whole.routes()]
        layout = self._call.layout
        num_remote = len(layout.block_owner) - len(layout.local_blocks)
        self._call.comm.traffic.count_union(torch.cat(self._chosen), num_remote)
        if self._domains.size > 1:
            self._call.comm.traffic.passed_on.append(pages_passed_on(self._rounds, self._domains.rank))
        return self._rounds

    def _listed(self, bits: Tensor, without: Tensor | None = None) -> PageLists:
        fetch, where = self._call.fetch, self._domains
        per_round = fetch.round_pages(self._page_bytes, where.size)
        return PageLists(bits, self._call.layout, where, per_round, fetch.whole_shard_fraction, without)

    def _local(self, stage: Stage) -> tuple[Tensor, Tensor]:
        return stage.of_keys(self._k), stage.of_keys(self._v)

    def _post_round(self, stage: Stage, number: int) -> None:
        route, name = self._rounds[stage.number][number], round_name("pages", stage, number)
        with self._side.entered():
            handle = post_pages(*self._local(stage), route, self._call.cfg.slc_block_len, self._call.comm, name)
        self._under_way[stage.number, number] = handle

    def _receive(self, stage: Stage, number: int) -> None:
        """Wait for the pages of a round, after posting the next one's if both fit in the budget."""
        rounds = self._rounds[stage.number]
        if not self._ahead:
            self._post_round(stage, number)
        elif number + 1 < len(rounds):
            self._post_round(stage, number + 1)
        pages = self._under_way.pop((stage.number, number)).wait()
        if self._call.fetch.keep_pages:
            self.kept.append(pages)
        self._here.append(Fetched(pages, rounds[number]))

    def _attend_here(
        self, stage: Stage, block_indices: Tensor, *, first: bool, all_here: bool
    ) -> tuple[Tensor, Tensor]:
        """Attention to those blocks that are here; own blocks are attended in the first round."""
        table = page_table(stage, self._k, self._here, self._call.layout, own=first)
        ids = block_indices if all_here else only_here(block_indices, table)
        arguments = page_arguments(stage, self._k, self._here, table, self._call, all_here=all_here)
        return self._call.ops.selected_attention(stage.of(self._q), *self._local(stage), ids, **arguments)
