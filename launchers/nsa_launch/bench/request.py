"""`nsa-dist bench cp`: what was asked for, checked against this machine."""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nsa_dist.bench.sizes import Sizes, sizes_for
from nsa_dist.bench.world import Place
from nsa_dist.cp.options import FetchOptions


@dataclass(frozen=True)
class Request:
    """The words of the command line, decided for this machine."""

    out: Path
    device: str
    place: Place | None  # None: one rank of many
    cp_size: int
    rank: int
    sizes: Sizes
    only: str
    repeats: int
    until: float  # time.monotonic() at which to start nothing more
    memory_curve: bool
    training: bool
    trace: bool
    everyday: bool
    cluster: Path | None  # None: the planner's own

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Request":
        """ValueError where the words ask for what this machine has not."""
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        sizes = sizes_for(device)
        if arguments.tokens:
            sizes = replace(sizes, tokens=arguments.tokens)
        if arguments.head_groups:
            sizes = replace(sizes, head_groups=_checked_groups(arguments.head_groups))
        if not 0 <= arguments.rank < arguments.cp:
            raise ValueError(
                f"--rank {arguments.rank} must be one of the ranks 0..{arguments.cp - 1} of --cp {arguments.cp}, as "
                f"one of them is measured; take --rank 0, which sees most"
            )
        place = place_of(arguments, device)
        repeats = (3 if place is None else 2) if arguments.repeats is None else arguments.repeats
        return cls(
            out=arguments.out,
            device=device,
            place=place,
            cp_size=arguments.cp,
            rank=arguments.rank,
            sizes=sizes,
            only=arguments.only,
            repeats=repeats,
            until=time.monotonic() + arguments.budget_s,
            memory_curve=not arguments.no_memory_curve,
            training=not arguments.no_training,
            trace=arguments.trace,
            everyday=arguments.everyday,
            cluster=arguments.cluster,
        )

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()


def _checked_groups(groups: tuple[int, ...]) -> tuple[int, ...]:
    for number in groups:
        FetchOptions(head_groups=number)  # ValueError says what is needed
    return groups


def place_of(arguments: argparse.Namespace, device: str) -> Place | None:
    """Where `--gpus` and `--ranks` put ranks; None without them."""
    visible = torch.cuda.device_count()
    if arguments.gpus is not None and arguments.ranks is not None:
        raise ValueError(
            "--gpus and --ranks exclude each other: a rank has a GPU of its own or shares one; give one of them"
        )
    if arguments.ranks is not None:
        _check_count(arguments.ranks, "--ranks")
        return Place(arguments.ranks, device, shared=True)
    if arguments.gpus is None:
        return None
    wanted = visible if arguments.gpus == -1 else arguments.gpus
    if device == "cpu" or not 0 < wanted <= visible:
        raise ValueError(
            f"--gpus {'all' if arguments.gpus == -1 else wanted} asks for GPUs of which torch sees {visible} here, and "
            f"each rank needs one; take --ranks {max(2, wanted)}, whose ranks share one device over gloo"
        )
    _check_count(wanted, "--gpus")
    return Place(wanted, device)


def _check_count(ranks: int, word: str) -> None:
    if ranks < 2:
        raise ValueError(
            f"{word} gives {ranks} ranks, but between ranks is what is measured, so it takes at least 2; leave {word} "
            f"out to measure one rank of many"
        )
