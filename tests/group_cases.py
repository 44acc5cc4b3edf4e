"""What spawned ranks tell of the timeouts of their process groups."""

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.groups import collectives_begun, groups_of_this_rank, set_timeout, timeout_of
from nsa_dist.train.world import entered

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
