"""What one rank does, whoever started it: find its place, check everybody's, train."""

import json
import os
import socket
from dataclasses import asdict

import torch
import torch.distributed as dist

from nsa_dist.train.hooks import Hooks
from nsa_dist.train.loop import TrainResult, train
from nsa_launch.config import RunConfig
from nsa_launch.processes import Processes
from nsa_launch.ranks import placement
from nsa_launch.ranks.placement import RankPlace
from nsa_launch.run_folder import RunFolder
from nsa_launch.versions import versions


def run(config: RunConfig, processes: Processes, hooks: Hooks, node: str, nvlink_domain: str) -> TrainResult:
    """Train as this rank. torch.distributed is initialised; `hooks` speaks for the launcher.

    Raises ValueError when a tensor x context parallel group leaves its NVLink domain unasked.
    """
    folder = RunFolder(config.run.output_dir)
    device = claim_device(processes)
    torch.set_num_threads(processes.threads_each)
    rank = dist.get_rank()
    mine = RankPlace(rank, socket.gethostname(), os.getpid(), node, nvlink_domain, str(device))
    places = placement.exchange(mine, device if processes.backend == "nccl" else torch.device("cpu"))
    if rank == 0:
        folder.topology.write_text(json.dumps([asdict(place) for place in places], indent=1), encoding="utf-8")
    if not config.launch.allow_split_groups:
        placement.check(places, config.group_size)
    if rank == 0:
        folder.record("start", world_size=len(places), step=folder.checkpointed_step(), versions=versions())
    result = train(config.resuming(), hooks, device)
    if rank == 0:
        folder.record("stop" if result.stopped else "end", step=result.step)
    return result


def claim_device(processes: Processes) -> torch.device:
    """The device of this rank, made current: a GPU for each local rank."""
    if processes.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device
