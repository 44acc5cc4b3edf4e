"""What one rank does, whoever started it: find its place, check everybody's, train."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from nsa_dist.mcore.groups import set_timeout
from nsa_dist.train.hooks import Hooks
from nsa_dist.train.loop import TrainResult, train
from nsa_launch.config import RunConfig
from nsa_launch.hangs.pulse import Pulse
from nsa_launch.memory.record import out_of_memory_noted
from nsa_launch.processes import Processes
from nsa_launch.ranks import placement
from nsa_launch.ranks.hooks import FolderHooks
from nsa_launch.ranks.placement import RankPlace
from nsa_launch.run_folder import RunFolder
from nsa_launch.versions import versions


def run(
    config: RunConfig,
    processes: Processes,
    hooks: FolderHooks,
    node: str,
    nvlink_domain: str,
    on_beat: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train as this rank. torch.distributed is initialised; `hooks` speaks for the launcher.

    `on_beat` is called every second or so, in a thread beside the training (`nsa_launch.hangs.pulse`).
    Raises ValueError when a tensor x context parallel group leaves its NVLink domain unasked.
    """
    device = claim_device(processes)
    torch.set_num_threads(processes.threads_each)
    mine = RankPlace(dist.get_rank(), socket.gethostname(), os.getpid(), node, nvlink_domain, str(device))
    pulses = RunFolder(config.run.output_dir).pulses
    with Pulse(pulses, mine.rank, dist.get_world_size(), on_beat) as hooks.pulse:
        return _run(config, hooks, mine, device)


def _run(config: RunConfig, hooks: Hooks, mine: RankPlace, device: torch.device) -> TrainResult:
    folder, is_main = RunFolder(config.run.output_dir), mine.rank == 0
    places = placement.exchange(mine, device)
    # All have met, which may take as long as a start; from here on a late rank hangs.
    set_timeout(dist.group.WORLD, timedelta(seconds=config.launch.process_group_timeout_s))
    if is_main:
        folder.topology.write_text(json.dumps([asdict(place) for place in places], indent=1), encoding="utf-8")
    if not config.launch.allow_split_groups:
        placement.check(places, config.group_size)
    if is_main:
        folder.record("start", world_size=len(places), step=folder.checkpointed_step(), versions=versions())
    with out_of_memory_noted(folder, mine.rank, device):
        result = train(config.resuming(), hooks, device)
    if is_main:
        folder.record("gave up" if result.failure else "stop" if result.stopped else "end", step=result.step)
    return result


def claim_device(processes: Processes) -> torch.device:
    """The device of this rank, made current: a GPU for each local rank."""
    if processes.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device
