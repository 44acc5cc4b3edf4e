"""Where the ranks of a bench run, and what a task sees of its rank."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from nsa_dist.cp.comm import Comm


@dataclass(frozen=True)
class Place:
    """Where ranks run: `cuda` with a GPU each over NCCL, or on one shared device over gloo."""

    num_ranks: int
    device: str  # "cpu" or "cuda"
    shared: bool = False  # all ranks on one GPU

    @property
    def backend(self) -> str:
        return "gloo" if self.device == "cpu" or self.shared else "nccl"

    def of(self, rank: int) -> torch.device:
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", 0 if self.shared else rank)


@dataclass(frozen=True)
class World:
    """What a task sees of its rank."""

    rank: int
    place: Place
    groups: dict[int, dist.ProcessGroup]  # by size: that of the first ranks

    @cached_property
    def device(self) -> torch.device:
        return self.place.of(self.rank)

    @property
    def sizes(self) -> list[int]:
        return sorted(self.groups)

    def comm(self, cp_size: int) -> Comm:
        return Comm(self.groups[cp_size] if cp_size > 1 else None)
