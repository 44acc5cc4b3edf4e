"""What decoding kernels read of a cache's books: pages and lengths of its sequences, on the device.

The books themselves are on the host (`SequenceState`); here is a copy of them, a row for each ring, brought up to date
before a call with what has changed since, through pinned memory: the host waits for nothing. Kernels take lengths on by
themselves. Rows are made for as many pages as the longest sequence has had, a power of two of them, and
move to another address when that grows, as a captured graph must know.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nsa_dist.cp.device import put_on


class Held(Protocol):
    """Of a sequence: its ring, what it has, and what of that the device's tables say already."""

    ring: int
    length: int
    pages: Tensor
    told_pages: int
    told_length: int


class Tables:
    """page_table int32 [rings, pages], lengths int32 [rings]."""

    def __init__(self, device: torch.device, most_pages: int = 0) -> None:
        self.device, self.most_pages = device, most_pages
        self.page_table = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(0, dtype=torch.int32, device=device)

    def tell(self, states: Sequence[Held], num_rings: int) -> None:
        """Bring the rows of `states` up to date; `told_pages` and `told_length` then say so."""
        held = [state.pages.numel() for state in states]
        self._make_room(num_rings, max([self.most_pages, *held]))
        behind = [state for state, count in zip(states, held, strict=True) if state.told_pages < count]
        if behind:
            width = self.page_table.shape[1]
            at = [state.ring * width + torch.arange(state.told_pages, len(state.pages)) for state in behind]
            pages = torch.cat([state.pages[state.told_pages :] for state in behind])
            index, pages = put_on(self.device, torch.stack([torch.cat(at), pages]))
            self.page_table.view(-1).index_copy_(0, index, pages.to(torch.int32))
        wrong = [state for state in states if state.told_length != state.length]
        if wrong:
            rows = torch.tensor([[state.ring for state in wrong], [state.length for state in wrong]])
            index, lengths = put_on(self.device, rows)
            self.lengths.index_copy_(0, index, lengths.to(torch.int32))
        for state, count in zip(states, held, strict=True):
            state.told_pages, state.told_length = count, state.length

    def _make_room(self, num_rings: int, num_pages: int) -> None:
        rings, width = self.page_table.shape
        if num_rings <= rings and num_pages <= width:
            return
        wider = max(width, self.most_pages)
        if num_pages > wider:
            wider = 1 << (num_pages - 1).bit_length()
        table = torch.zeros(max(rings, num_rings), wider, dtype=torch.int32, device=self.device)
        lengths = torch.zeros(len(table), dtype=torch.int32, device=self.device)
        table[:rings, :width] = self.page_table
        lengths[:rings] = self.lengths
        self.page_table, self.lengths = table, lengths
