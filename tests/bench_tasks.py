"""Tasks for the teams of tests/launch/test_bench.py: importable, because spawned processes find them by name."""

import time

import torch

from nsa_dist.bench.world import World


def rank_of(world: World) -> int:
    return world.rank


def fails_on_rank_one(world: World) -> None:
    """Rank 0 waits for a rank that will never come."""
    if world.rank == 1:
        raise torch.cuda.OutOfMemoryError("no room\nand more")
    world.comm(2).all_gather(torch.zeros(1), "test")


def is_silent(world: World) -> None:
    time.sleep(60)
