"""Domains: consecutive ranks with quick links to each other, such as those of one node. A page enters each once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Domains:
    """The ranks of a group in domains of `size`, and where this one is. Size 1: every rank for itself."""

    size: int
    num_ranks: int
    rank: int

    @property
    def count(self) -> int:
        return self.num_ranks // self.size

    @property
    def own(self) -> int:
        """The number of this rank's domain."""
        return self.rank // self.size

    @property
    def lane(self) -> int:
        """The number of this rank in it."""
        return self.rank % self.size

    @property
    def ranks(self) -> slice:
        """Those of this rank's domain."""
        return slice(self.own * self.size, (self.own + 1) * self.size)
