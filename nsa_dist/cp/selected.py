"""Selected attention over ranks: fetch what was chosen, attend, merge rounds; backward fetches again and sends home.

Forward, for the stages 0, 1, ... of `call.forward_stages`; a bitmap tells every owner what to send, and its bits come
to the host while the device works on the next stage:

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
from nsa_dist.cp.device import Side, read_on_host
from nsa_dist.cp.fetch import (
    Route,
    chosen_elsewhere,
    pack_bits,
    plan_rounds,
    post_pages,
    unpack_bits,
    widen_to_whole_shards,
)
from nsa_dist.cp.pages import Fetched, only_here, page_arguments, page_table, round_name


class SelectedForward:
    """The selected branch of one forward; k [T, Hkv, Dk], v [T, Hkv, Dv] are the rank's own."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, stages: list[Stage], call: Call):
        self._q, self._k, self._v, self._call = q, k, v, call
        self._alone = call.comm.size == 1
        self._halves = len(stages) > 1 and stages[0].kv_heads == stages[1].kv_heads
        self._page_bytes = call.cfg.slc_block_len * (k.shape[2] + v.shape[2]) * k.element_size()
        self._ahead = call.fetch.fetches_ahead(self._page_bytes)
        self._side = Side(q.device)
        self._bitmaps: list[Handle] = []
        self._chosen: list[Tensor] = []  # bool [P, h, B] a stage: what every rank's queries chose elsewhere
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
        """Read what all ranks chose, which has come meanwhile, and start the first round."""
        if self._alone:
            return
        with self._side.entered():
            bits = read_on_host(self._bitmaps[stage.number].wait())
        chosen = unpack_bits(bits, len(self._call.layout.block_owner))
        wanted = self._widened(chosen)
        if self._halves and stage.number == 1:
            wanted = self._widened(self._chosen[0] | chosen) & ~self._widened(self._chosen[0])
        self._chosen.append(chosen)
        self._rounds.append(self._planned(wanted))
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
        if self._halves:
            self._chosen = [self._chosen[0] | self._chosen[1]]
            self._rounds = [self._planned(self._widened(self._chosen[0]))]
        own = torch.cat([chosen[self._call.comm.rank] for chosen in self._chosen])
        self._call.comm.traffic.count_union(own, len(self._call.layout.local_blocks))
        return self._rounds

    def _widened(self, chosen: Tensor) -> Tensor:
        return widen_to_whole_shards(chosen, self._call.layout.block_owner, self._call.fetch.whole_shard_fraction)

    def _planned(self, wanted: Tensor) -> list[Route]:
        per_round = self._call.fetch.round_pages(self._page_bytes)
        return plan_rounds(wanted, self._call.layout, self._call.comm.rank, per_round)

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
        arguments = page_arguments(stage, self._k, self._here, table, self._call)
        return self._call.ops.selected_attention(stage.of(self._q), *self._local(stage), ids, **arguments)
