"""Where the tokens of one call come from and go to: index tensors, made on the CPU from lengths and pages alone.

The operators see one stream in which every sequence stands from its first token on, in whole selection blocks, as
training's documents do; queries are its new tokens only. `aligned`: query rows and the window's rows begin and end at
whole blocks, as training's, so that kernels cut tiles at the same places; rows that are no token's see nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from nsa_dist.cp.device import put_on
from nsa_dist.cp.plan import runs
from nsa_dist.inference.cache import SequenceState
from nsa_dist.inference.storage import CacheShape

Found = TypeVar("Found", bound=Any)


@dataclass(frozen=True)
class Extended:
    """New tokens behind those before them that a ring holds, sequence by sequence, and what the ring is to keep."""

    num_rows: int
    ring_rows: Tensor  # int64: rows of the flat rings that are read
    ring_to: Tensor  # int64: and where they go
    new_to: Tensor  # int64 [T]: where the new tokens go
    kept: Tensor  # int64: new tokens that the rings keep
    kept_to: Tensor  # int64: and their rows


@dataclass(frozen=True)
class Places:
    """T new tokens of B sequences in Q query rows; F new compressed blocks, of M."""

    token_rows: Tensor | None  # int64 [T]: query row of each new token; None: the same
    num_rows: int  # Q
    position: Tensor  # int32 [Q], place in the stream; -1: no token's
    doc_start: Tensor  # int32 [Q]
    cmp_begin: Tensor  # int32 [Q]: compressed rows that a query sees, [begin, end)
    cmp_end: Tensor
    win_begin: Tensor  # int32 [Q]: rows of its window
    win_end: Tensor
    block_page: Tensor  # int64 [blocks of the stream]: their pages
    new_slots: Tensor  # int64 [T]: rows of the flat pages for the new tokens
    cmp_slots: Tensor  # int64 [M]: rows of the flat pages of compressed blocks
    cmp_to: Tensor | None  # int64 [M]: where they go; None: in a row
    num_cmp_rows: int
    fresh_slots: Tensor  # int64 [F]: rows of the flat pages for new compressed blocks
    fresh_rows: Tensor  # int32 [F]: where they begin in the raw rows
    fresh_start: Tensor  # int64 [F]: and in their sequence
    win: Extended
    raw: Extended


def places(
    states: Sequence[SequenceState],
    added: Sequence[int],
    shape: CacheShape,
    device: torch.device,
    *,
    aligned: bool,
    key_alignment: int,
) -> Places:
    """For `added` tokens behind those of `states`, which hold the pages for them.

    key_alignment       multiple at which the compressed rows of each sequence start, where there are several
    """
    made = _Maker(states, added, shape, aligned)
    had, num_cmp = made.num_cmp(made.start), made.num_cmp(made.end)
    alone = key_alignment == 1 or len(states) == 1
    cmp_rows = num_cmp if alone else (num_cmp + key_alignment - 1) // key_alignment * key_alignment
    first_cmp = _before(cmp_rows)
    fresh, fresh_of = runs(had, num_cmp - had), made.of(num_cmp - had)
    fresh_start = fresh * shape.cfg.cmp_stride
    # The first new block of a sequence begins at or before its first new token.
    raw_from = torch.where(had < num_cmp, had * shape.cfg.cmp_stride, made.start)
    raw, raw_at = made.extended(raw_from, raw_from, made.end, shape.raw_ring)
    win_from = (made.start - (shape.cfg.window_len - 1)).clamp(min=0)
    win_first = made.whole_down(win_from)
    win, win_at = made.extended(win_from, win_first, made.row_end, shape.win_ring)
    found = Places(
        **made.queries(first_cmp, win_at - win_first, win_from),
        num_rows=int(made.num_rows.sum()),
        block_page=made.pages,
        new_slots=made.rows_of(made.token_of, made.token, shape.cfg.slc_block_len),
        cmp_slots=made.cmp_slots(made.of(num_cmp), runs(torch.zeros_like(num_cmp), num_cmp)),
        cmp_to=None if alone else runs(first_cmp, num_cmp),
        num_cmp_rows=int(cmp_rows.sum()),
        fresh_slots=made.cmp_slots(fresh_of, fresh),
        fresh_rows=((raw_at - raw_from)[fresh_of] + fresh_start).to(torch.int32),
        fresh_start=fresh_start,
        win=win,
        raw=raw,
    )
    return found if device.type == "cpu" else put(found, device)


class _Maker:
    """[B] start and end of what is new of each sequence, and of the query rows; new tokens [T] by position."""

    def __init__(self, states: Sequence[SequenceState], added: Sequence[int], shape: CacheShape, aligned: bool) -> None:
        self.shape, self.block_len, self.is_aligned = shape, shape.cfg.slc_block_len, aligned
        self.start = torch.tensor([state.length for state in states])
        self.count = torch.tensor(added)
        self.end = self.start + self.count
        self.row_first = self.whole_down(self.start)
        row_end = self.whole_down(self.end + self.block_len - 1) if aligned else self.end
        self.row_end = torch.where(self.count > 0, row_end, self.row_first)
        self.num_rows = self.row_end - self.row_first
        self.pages = torch.cat([state.pages for state in states])
        self.first_block = _before(torch.tensor([len(state.pages) for state in states]))
        self.ring = torch.tensor([state.ring for state in states])
        self.token_of, self.token = self.of(self.count), runs(self.start, self.count)

    def of(self, counts: Tensor) -> Tensor:
        """The sequence of each of `counts` [B] things of each."""
        return torch.arange(len(counts)).repeat_interleave(counts)

    def whole_down(self, position: Tensor) -> Tensor:
        return position // self.block_len * self.block_len if self.is_aligned else position

    def num_cmp(self, length: Tensor) -> Tensor:
        return ((length - self.shape.cfg.cmp_block_len) // self.shape.cfg.cmp_stride + 1).clamp_(min=0)

    def rows_of(self, of: Tensor, index: Tensor, per_page: int) -> Tensor:
        """Rows of the flat pages."""
        return self.pages[self.first_block[of] + index // per_page] * per_page + index % per_page

    def cmp_slots(self, of: Tensor, block: Tensor) -> Tensor:
        """A compressed block lies with its last token: in the cell of d tokens that it ends with."""
        cell = block + (self.shape.cfg.cmp_block_len // self.shape.cfg.cmp_stride - 1)
        return self.rows_of(of, cell, self.shape.cmp_per_page)

    def extended(self, read_from: Tensor, first: Tensor, end: Tensor, ring_len: int) -> tuple[Extended, Tensor]:
        """Rows for the positions [first, end) of each sequence, and where those begin [B]; read from `read_from` on."""
        some = self.count > 0
        num_rows = torch.where(some, end - first, 0)
        at = _before(num_rows)
        before = torch.where(some, self.start - read_from, 0)
        old_of, old = self.of(before), runs(read_from, before)
        keep = torch.minimum(self.count, torch.full_like(self.count, ring_len))
        kept_of, kept = self.of(keep), runs(self.end - keep, keep)

        def ring_rows(of: Tensor, position: Tensor) -> Tensor:
            return self.ring[of] * ring_len + position % ring_len

        rows = Extended(
            num_rows=int(num_rows.sum()),
            ring_rows=ring_rows(old_of, old),
            ring_to=(at - first)[old_of] + old,
            new_to=(at - first)[self.token_of] + self.token,
            kept=(_before(self.count) - self.start)[kept_of] + kept,
            kept_to=ring_rows(kept_of, kept),
        )
        return rows, at

    def queries(self, first_cmp: Tensor, win_shift: Tensor, win_from: Tensor) -> dict[str, Any]:
        """What `Places` says of each query row. Rows before the first new token see nothing where it begins to see,
        rows after the last see nothing where that one ends: no begin or end ever decreases."""
        of, row = self.of(self.num_rows), runs(self.row_first, self.num_rows)
        start, end = self.start[of], self.end[of]
        early, late = row < start, row >= end
        real = ~(early | late)
        stream, first = self.first_block[of] * self.block_len, first_cmp[of]
        cmp_end = first + torch.where(early, 0, self.num_cmp(torch.minimum(row + 1, end)))
        win_end = torch.where(early, win_from[of], row + real)
        win_begin = torch.where(real, (row - (self.shape.cfg.window_len - 1)).clamp_(min=0), win_end)
        rows = {
            "position": torch.where(real, stream + row, -1),
            "doc_start": torch.where(real, stream, 0),
            "cmp_begin": torch.where(late, cmp_end, first),
            "cmp_end": cmp_end,
            "win_begin": win_begin + win_shift[of],
            "win_end": win_end + win_shift[of],
        }
        packed: dict[str, Any] = {name: x.to(torch.int32) for name, x in rows.items()}
        return {**packed, "token_rows": None if bool(real.all()) else real.nonzero().squeeze(1)}


def _before(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def put(found: Found, device: torch.device) -> Found:
    """The same on `device`."""
    changed: dict[str, Any] = {}
    for name in (field.name for field in fields(found)):
        value = getattr(found, name)
        if is_dataclass(value):
            changed[name] = put(value, device)
        elif isinstance(value, Tensor):
            changed[name] = put_on(device, value)
    return replace(found, **changed)
