"""What spawned ranks tell of the timeouts of their process groups."""

import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nsa_dist.mcore.groups import collectives_begun, groups_of_this_rank, set_timeout, timeout_of
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.world import entered
from nsa_launch.hangs.pulse import Pulse
from nsa_launch.hangs.signs import read_all
from nsa_launch.hangs.verdict import hung

TIMEOUT_S = 1234.567
HANG_TIMEOUT_S = 0.5


def timeouts(rank: int, configs: dict[str, TrainConfig]) -> dict[str, dict[str, float]]:
    """{layout: {group: seconds}}, of every group that Megatron keeps anywhere, by the name it keeps it under."""
    set_timeout(dist.group.WORLD, timedelta(seconds=TIMEOUT_S))
    return {name: _timeouts(config) for name, config in configs.items()}


def _timeouts(config: TrainConfig) -> dict[str, float]:
    with entered(config, torch.device("cpu")):
        kept = {name: value for name, value in vars(parallel_state).items() if "GROUP" in name}
        listed = {f"listed {i}": group for i, group in enumerate(groups_of_this_rank())}
        groups = {name: value for name, value in {**kept, **listed}.items() if isinstance(value, dist.ProcessGroup)}
        return {name: timeout_of(group).total_seconds() for name, group in groups.items()}


class Told(NamedTuple):
    """By one rank, of the three below."""

    timeouts: dict[str, dict[str, float]]
    hung: list[str]
    raised: str
    begun: dict[str, int]


def told(rank: int, configs: dict[str, TrainConfig], folder: Path) -> Told:
    """All of it in one spawn."""
    return Told(
        timeouts(rank, configs), waited_for(rank, configs["context"], folder), *late_rank(rank, configs["context"])
    )


def late_rank(rank: int, config: TrainConfig) -> tuple[str, dict[str, int]]:
    """Rank 0 alone comes to a context-parallel collective: what it was told, and what this rank has begun."""
    set_timeout(dist.group.WORLD, timedelta(seconds=60))
    with entered(config, torch.device("cpu")):
        group, told = parallel_state.get_context_parallel_group(), ""
        set_timeout(group, timedelta(seconds=HANG_TIMEOUT_S))
        if rank == 0:
            try:
                dist.all_reduce(torch.ones(1), group=group)
            except RuntimeError as error:
                told = str(error)
        begun = collectives_begun()
        # Not by a collective: rank 1 must not close its groups before rank 0 has given up.
        store = dist.distributed_c10d._get_default_store()
        store.set(f"done {rank}", "")
        store.wait([f"done {1 - rank}"], timedelta(seconds=600))
        return told, begun


def waited_for(rank: int, config: TrainConfig, folder: Path) -> list[str]:
    """Rank 0 waits in a collective, to which rank 1 comes only when the signs of both tell it who is waited for."""
    with entered(config, torch.device("cpu")), Pulse(folder, rank, 2) as pulse:
        pulse.begins("step", 1)
        found: list[str] = []
        while rank == 1 and not found:
            time.sleep(0.05)  # between two looks
            signs = read_all(folder, range(2))
            if [sign.phase for sign in signs] == ["step", "step"]:  # not those of the start, a beat ago
                found = [str(each) for each in hung(signs)]
        dist.all_reduce(torch.ones(1), group=parallel_state.get_context_parallel_group())
        return found
