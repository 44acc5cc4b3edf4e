"""Selected attention over ranks that read each other's pages: nothing of it is decided, or waited for, on the host.

    forward     put k, v | meet | stage h: mark what was chosen, take the marked pages, under the work of stage h + 1
    backward    the same again, or the pages that were kept; what was found for the pages of others is put, and each
                owner adds it to its own, sources in the order of the ranks, in chunks of blocks of a fixed size

Every remote block has its place in the buffer of a stage, chosen or not, so the table of pages is known beforehand and
no shape depends on what was chosen. Under a budget the places are cut into ranges of so many blocks, whose results are
merged by `softmax_lse` as rounds are; how many there are follows from sizes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.cp.call import Call, Stage
from nsa_dist.cp.device import Side
from nsa_dist.cp.one_sided.comm import OneSidedComm, Queued
from nsa_dist.cp.one_sided.tables import reader_tables
from nsa_dist.cp.options import CHUNK_BYTES
from nsa_dist.cp.pages import only_here, round_name, short_of
from nsa_kernels.exchange.mailbox import aligned
from nsa_kernels.exchange.pages import gradient_slot_bytes


@dataclass(frozen=True)
class Range:
    """Remote blocks of numbers `first` to `stop`, whose pages are held at once."""

    number: int
    first: int
    stop: int


class Taken:
    """Pages of a range on their way into `pages` [h * places, l', Dk + Dv]."""

    def __init__(self, pages: Tensor, name: str, comm: OneSidedComm) -> None:
        self._pages: Tensor | None = pages
        self._name, self._comm, self._queued = name, comm, comm.queued()

    @property
    def pages(self) -> Tensor:
        assert self._pages is not None
        return self._pages

    def wait(self) -> Tensor:
        """The pages; the current stream waits for them."""
        self._comm.note("wait", self._name, "pages")
        if self._queued is not None:
            self._queued.wait()
        self._comm.note("done", self._name, "pages")
        return self.pages

    def free(self) -> None:
        self._pages = None


class Pages:
    """The slots with everybody's k [T, Hkv, Dk], v [T, Hkv, Dv], and buffers [h * places, l', Dk + Dv] of a stage."""

    def __init__(self, k: Tensor, v: Tensor, call: Call) -> None:
        self._k, self._v, self._call = k, v, call
        self._blocks = reader_tables(call.layout).blocks
        self.comm: OneSidedComm = call.comm  # type: ignore[assignment]
        self._v_bytes = aligned(k.numel() * k.element_size())
        self._box = self.comm.boxes.of("pages", self._v_bytes + v.numel() * v.element_size())
        self._published: tuple[Tensor, ...] = ()

    def publish(self) -> None:
        """Put the rank's own where the others read it, once a forward and once a backward."""
        k, v = self._k.contiguous(), self._v.contiguous()
        with self.comm.beside():
            self.comm.boxes.put(self._box, k)
            self.comm.boxes.put(self._box, v, self._v_bytes)
            self.comm.boxes.meet(self._box)
        self._published = k, v  # kept while they are read on the side stream

    def ranges(self, num_heads: int) -> list[Range]:
        """Of a stage of so many heads: one, or as many as the budget asks for."""
        count = len(self._blocks.remote)
        page_bytes = self._call.cfg.slc_block_len * (self._k.shape[2] + self._v.shape[2]) * self._k.element_size()
        pages = self._call.fetch.round_pages(page_bytes)
        size = max(1, count if pages is None else pages // num_heads)
        return [Range(n, first, min(first + size, count)) for n, first in enumerate(range(0, max(1, count), size))]

    def take(self, stage: Stage, marks: Tensor, part: Range, into: Tensor | None = None) -> Taken:
        """The marked pages of a range on their way. Call it `beside` the current stream."""
        dim_k = self._k.shape[2]
        name = round_name("pages", stage, part.number)
        self.comm.note("post", name, "pages")
        if into is None:
            places = len(marks) * (part.stop - part.first)
            sizes = places, self._call.cfg.slc_block_len, dim_k + self._v.shape[2]
            into = self.comm.boxes.page_buffer(self._k, sizes)
        self.comm.boxes.take_pages(
            self._box, marks, into, self._blocks.remote[part.first : part.stop], self._blocks.owner,
            self._blocks.page, self.place(part), v_bytes=self._v_bytes, first_head=stage.kv_heads.start,
            num_heads=self._k.shape[1], dim_k=dim_k,
        )  # fmt: skip
        return Taken(into, name, self.comm)

    def place(self, part: Range) -> Tensor:
        """int32 [num_blocks]: where in a range each block is; -1: not there."""
        of_all = self._blocks.place
        if part.stop - part.first == len(self._blocks.remote):
            return of_all
        here = (of_all >= part.first) & (of_all < part.stop)
        return torch.where(here, of_all - part.first, -1)

    def table(self, heads: int, part: Range) -> Tensor:
        """block_table int32 [heads, num_blocks]: the rank's own pages, in the first range, and the range's."""
        layout = self._call.layout
        is_whole = part.stop - part.first == len(self._blocks.remote)
        if is_whole and heads in self._blocks.tables:
            return self._blocks.tables[heads]
        place, own = self.place(part), layout.own_pages
        if part.number > 0:
            own = torch.full_like(own, -1)
        head = torch.arange(heads, device=place.device, dtype=torch.int32)[:, None]
        first = len(layout.local_blocks) + head * (part.stop - part.first)
        table = torch.where(place >= 0, first + place, own)
        if is_whole:
            self._blocks.tables[heads] = table
        return table

    def arguments(self, stage: Stage, taken: Tensor, table: Tensor, *, all_here: bool) -> dict[str, Any]:
        """What `selected_attention` and its backward take besides tensors of the queries and the rank's own pages.

        all_here    whether these are all the blocks that the stage's queries chose
        """
        dim_k = self._k.shape[2]
        return {
            **(short_of(stage, self._call) if all_here else {}),
            "block_table": table,
            "position": stage.of_rows(self._call.layout.position),
            "slc_block_len": self._call.cfg.slc_block_len,
            "softmax_scale": self._call.softmax_scale,
            "k_remote": taken[..., :dim_k],
            "v_remote": taken[..., dim_k:],
        }

    def local(self, stage: Stage) -> tuple[Tensor, Tensor]:
        return stage.of_keys(self._k), stage.of_keys(self._v)


class PulledForward:
    """The selected branch of one forward; k [T, Hkv, Dk], v [T, Hkv, Dv] are the rank's own."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, stages: list[Stage], call: Call):
        self._q, self._call, self._pages = q, call, Pages(k, v, call)
        self._stages, self._side = stages, Side(q.device)
        self._halves = len(stages) > 1 and stages[0].kv_heads == stages[1].kv_heads
        self._marks: list[Tensor] = []
        self._under_way: list[Taken] = []
        self._attended: Taken | None = None
        self._wanted: Tensor | None = None
        self.kept: list[Tensor] = []
        self._pages.publish()

    def post_bitmap(self, block_indices: Tensor) -> None:
        """Mark what the queries of the next stage chose, block_indices [rows, h, n], and take it."""
        stage = self._stages[len(self._marks)]
        marks = self._pages.comm.boxes.mark_blocks(block_indices, len(self._call.layout.block_owner))
        wanted, into = marks, None
        if self._halves and stage.number == 1:  # what the first half did not take, beside what it did
            wanted, into = marks & ~self._marks[0], self._under_way[0].pages
        self._marks.append(marks)
        self._wanted = wanted  # kept while it is read on the side stream
        with self._pages.comm.beside():
            self._under_way.append(self._pages.take(stage, wanted, self._pages.ranges(len(marks))[0], into))

    def post_fetch(self, stage: Stage) -> None:
        """Nothing: pages are on their way since they were marked."""

    def attend(self, stage: Stage, block_indices: Tensor) -> tuple[Tensor, Tensor]:
        """out [rows, Hq of the stage, Dv] and softmax_lse of one stage, its ranges merged."""
        heads, result = block_indices.shape[1], None
        ranges = self._pages.ranges(heads)
        for part in ranges:
            if part.number > 0:
                self.release()
                with self._pages.comm.beside():
                    self._under_way[stage.number] = self._pages.take(stage, self._marks[stage.number], part)
            taken = self._under_way[stage.number].wait()
            if self._call.fetch.keep_pages:
                self.kept.append(taken)
            table = self._pages.table(heads, part)
            all_here = len(ranges) == 1
            ids = block_indices if all_here else only_here(block_indices, table)
            arguments = self._pages.arguments(stage, taken, table, all_here=all_here)
            with self._call.comm.computing(round_name("slc", stage, part.number), "slc"):
                found = self._call.ops.selected_attention(
                    stage.of(self._q), *self._pages.local(stage), ids, **arguments
                )
                result = found if result is None else self._call.ops.merge(*result, *found)
            self._attended = self._under_way[stage.number]
            del taken
        assert result is not None
        return result

    def release(self) -> None:
        """Free the pages of the range that was attended to last; a first half's stay for the second."""
        self._follow()
        if self._attended is not None and not self._halves:
            self._attended.free()

    def _follow(self) -> None:
        if not self._call.comm.in_line:
            self._side.follow()

    def finish(self) -> list[Tensor]:
        """The marks of every head group, uint8 [h, num_blocks], for backward."""
        self._follow()
        self._under_way = []
        return [self._marks[0] | self._marks[1]] if self._halves else self._marks


class PulledBackward:
    """k [T, Hkv, Dk], v [T, Hkv, Dv]; the marks of every head group and, if they were kept, the pages of each."""

    def __init__(
        self, k: Tensor, v: Tensor, groups: list[Stage], marks: list[Tensor], kept: Sequence[Tensor], call: Call
    ):
        self._pages, self._call, self._groups, self._marks = Pages(k, v, call), call, groups, marks
        self._kept, self._side = list(kept), Side(k.device)
        self._to_take = [(g, part) for g in groups for part in self._pages.ranges(len(marks[g.number]))]
        self._under_way: list[Taken] = []
        self._going_home: list[tuple[Queued, tuple[Tensor, ...]]] = []
        self._grads: dict[int, tuple[Tensor, Tensor]] = {}

    def start(self) -> None:
        """Put the rank's own pages for the others again, and take those of the first group."""
        if not self._kept:
            self._pages.publish()
            self.post_next()

    def post_next(self) -> None:
        if self._to_take and not self._kept:
            group, part = self._to_take.pop(0)
            with self._pages.comm.beside():
                self._under_way.append(self._pages.take(group, self._marks[group.number], part))

    def run(
        self, group: Stage, q: Tensor, grad_out: Tensor, gate: Tensor, delta: Tensor, lse: Tensor, block_indices: Tensor
    ) -> Tensor:
        """dq of one head group, rounded once to the dtype of q; the other tensors are the group's [T, its Hq, ...]."""
        total, marks = None, self._marks[group.number]
        ranges = self._pages.ranges(len(marks))
        for part in ranges:
            taken = self._receive()
            table = self._pages.table(len(marks), part)
            all_here = len(ranges) == 1
            ids = block_indices if all_here else only_here(block_indices, table)
            with self._call.comm.computing(round_name("slc", group, part.number), "slc"):
                dq, dk, dv, dk_others, dv_others = self._call.ops.selected_attention_backward(
                    grad_out, gate, delta, lse, q, *self._pages.local(group), ids, dtype=self._call.sum_dtype(q),
                    **self._pages.arguments(group, taken, table, all_here=all_here),
                )  # fmt: skip
            total = dq if total is None else total.add_(dq)
            if not self._call.comm.in_line:
                self._side.follow()
            del taken
            self._send_home(group, part, (dk, dv), (dk_others, dv_others))
        assert total is not None
        return total.to(q.dtype)

    def finish(self) -> list[Tensor]:
        """dk [T, Hkv, Dk], dv [T, Hkv, Dv] of own rows, when all has come home: fp32 or better."""
        while self._going_home:
            self._going_home.pop(0)[0].wait()
        return [torch.cat(x, 1) if len(x) > 1 else x[0] for x in zip(*self._grads.values(), strict=True)]

    def _receive(self) -> Tensor:
        """The pages of the range at hand, and the next one's on their way."""
        if self._kept:
            return self._kept.pop(0)
        self.post_next()
        return self._under_way.pop(0).wait()

    def _send_home(
        self, group: Stage, part: Range, own: tuple[Tensor, Tensor], of_others: tuple[Tensor, Tensor]
    ) -> None:
        """Add what was found for own pages to that of the ranges before, and to it what others found for them."""
        comm = self._pages.comm
        if part.number == 0:  # which of its blocks others chose: read again for every range, which is not counted
            heads = len(self._marks[group.number])
            comm.traffic.add("bitmap", (comm.size - 1) * heads * len(self._call.layout.local_blocks))
        with comm.beside():
            if group.number in self._grads:
                for total, grad in zip(self._grads[group.number], own, strict=True):
                    total += grad
            else:
                self._grads[group.number] = own
            place = self._pages.place(part)
            self._exchange(self._grads[group.number], of_others, self._marks[group.number], place)
            queued = comm.queued()
        if queued is not None:
            self._going_home.append((queued, (*own, *of_others, place)))
        if len(self._going_home) > 1:
            self._going_home.pop(0)[0].wait()

    def _exchange(
        self, totals: tuple[Tensor, Tensor], of_others: tuple[Tensor, Tensor], marks: Tensor, place: Tensor
    ) -> None:
        """Chunk by chunk of blocks: put what was found for others' pages, meet, add what others found for own ones."""
        boxes, holders = self._pages.comm.boxes, reader_tables(self._call.layout).blocks
        (heads, num_blocks), block_len = marks.shape, self._call.cfg.slc_block_len
        dim, itemsize = sum(x.shape[2] for x in totals), totals[0].element_size()
        chunk = max(1, min(num_blocks, CHUNK_BYTES // (heads * block_len * dim * itemsize)))
        box = boxes.of("pages.grad", gradient_slot_bytes(heads, chunk, block_len, dim, itemsize))
        for first in range(0, num_blocks, chunk):
            blocks = range(first, min(first + chunk, num_blocks))
            boxes.put_gradients(box, marks, place, *of_others, blocks)
            boxes.meet(box)
            boxes.add_gradients(box, holders.owner, holders.page, *totals, blocks, block_len)
