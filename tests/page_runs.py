"""Runs the Python of a page in processes that have imported torch and Megatron-core already: forks of one server."""

import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
from torch.distributed import TCPStore

from forks import as_here, forks

LIMIT_S = 240


def run_page(script: Path, world_size: int) -> str:
    """What a process said that did not end well, or nothing. With several it is as torchrun would start them."""
    context, environment = forks(), dict(os.environ)
    store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    outputs = [script.with_suffix(f".{rank}.txt") for rank in range(world_size)]
    ranks = [
        context.Process(target=_rank, args=(script, rank, world_size, store.port, output, environment), daemon=True)
        for rank, output in enumerate(outputs)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT_S)
    said = [
        f"rank {rank}, exit code {process.exitcode} (None: not within {LIMIT_S} s):\n{output.read_text()[-3000:]}"
        for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True))
        if process.exitcode != 0
    ]
    for process in ranks:
        process.kill()
    return "\n".join(said)


def _rank(script: Path, rank: int, world_size: int, port: int, output: Path, environment: dict[str, str]) -> None:
    as_here(environment)
    stream = output.open("w", buffering=1)  # to the end of the process, which may speak last
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    torch.set_num_threads(1)
    os.chdir(script.parent)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
    try:
        runpy.run_path(str(script), run_name="__main__")
    except BaseException:
        traceback.print_exc()
        raise
