"""Real processes over gloo with a file as the meeting point: one spawn serves a whole test file."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from forks import as_here, forks


def run_ranks(world_size: int, work: Callable, *args) -> list:
    """`work(rank, *args)` in `world_size` processes of one gloo group; their results by rank.

    `work` and its results must pickle; an exception on any rank is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        forks()  # says what their server imports first
        environment = dict(os.environ)
        mp.start_processes(_enter, (world_size, folder, environment, work, args), world_size, start_method="forkserver")
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(world_size)]


def _enter(rank: int, world_size: int, folder: str, environment: dict, work: Callable, args: tuple) -> None:
    as_here(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    result = work(rank, *args)
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def groups_up_to(world_size: int) -> dict[int, dist.ProcessGroup]:
    """For every size the group of the first `size` ranks; a rank outside of it must not use it."""
    return {size: dist.new_group(list(range(size))) for size in range(1, world_size + 1)}


def attempted(results: dict[str, str], name: str, work: Callable[[], None]) -> None:
    """Enters how `work` failed on this rank, or ""."""
    try:
        work()
        results[name] = ""
    except Exception:
        results[name] = traceback.format_exc()
