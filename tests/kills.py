"""A run whose processes are killed at random, drawn by seed, until it ends; what became of it, and what it left behind.

It lives on a host of its own (`two_hosts.Host`: names, processes, shared memory and Ray's folder), so that nothing else
is hit and whatever is left there is its own.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from nsa_dist.train.files.records import MetricsFollower
from nsa_launch import exit_codes
from nsa_launch.run_folder import RunFolder
from two_hosts import Host

# Whom a process is by the beginning of what it calls itself, or by the name of its program.
VICTIMS = {
    "rank": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "raylet": "raylet",
    "driver": "python -m nsa_launch",
}
LONGEST_S = 10.0  # from when a victim is there to its end
_DEAD = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


@dataclass
class Killed:
    """One run from its beginning to its end."""

    folder: RunFolder
    kills: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)  # of the commands that it took
    said: str = ""

    def losses(self) -> list[tuple[int, float, float]]:
        """As written, steps that were made again included."""
        records = MetricsFollower(self.folder.output.metrics).poll()
        return [(r["step"], r["loss"], r["grad_norm"]) for r in records if r.get("kind") == "train"]


def processes_on(host: Host) -> list[psutil.Process]:
    """All that are alive there but for the host's first."""
    here, found = os.readlink(f"/proc/{host.pid}/ns/pid"), []
    for process in psutil.process_iter():
        try:
            if os.readlink(f"/proc/{process.pid}/ns/pid") == here and process.status() not in _DEAD:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return [process for process in found if process.pid != host.pid]


def of_kind(host: Host, kind: str) -> list[psutil.Process]:
    return [process for process in processes_on(host) if _is(process, kind)]


def _is(process: psutil.Process, kind: str) -> bool:
    try:
        words, program = process.cmdline(), Path(process.exe()).name
    except (OSError, psutil.Error):
        return False
    mark = VICTIMS[kind]
    if kind == "raylet":
        return program == mark
    if kind == "driver":
        return words[1:3] == mark.split()[1:] and program.startswith("python")
    return bool(words) and words[0].startswith(mark)


def kill(victims: Sequence[psutil.Process]) -> None:
    for process in victims:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # it died by itself since it was looked for
            continue


def run_through(
    host: Host, config: Path, folder: RunFolder, words: Sequence[str], draw: random.Random, most: int
) -> Killed:
    """One run to its end, with `most` kills at most at drawn times; the command is given again if it died of one."""
    told = Killed(folder)
    output = host.home / "said"
    output.unlink(missing_ok=True)
    while exit_codes.OK not in told.exits:
        assert len(told.exits) <= most + 1, f"{told.kills} {told.exits}\n{output.read_text()[-5000:]}"
        again = ["resume=true"] if told.exits else []
        command = [sys.executable, "-m", "nsa_launch", "train", str(config), *words, *again]
        running = host.start(command, output)
        while running.poll() is None:
            if len(told.kills) == most:
                running.wait(900)
                break
            kinds = draw.sample(list(VICTIMS), draw.choice([1, 1, 1, 1, 2]))
            victims = _when_there(host, running, kinds, draw)
            if victims:
                kill(victims)
                told.kills.append(" and ".join(kinds))
        told.exits.append(running.returncode)
    told.said = output.read_text()
    return told


def _when_there(
    host: Host, running: subprocess.Popen, kinds: Sequence[str], draw: random.Random
) -> list[psutil.Process]:
    """One process of each kind, a drawn while after there was one of each; none if the command ended before."""
    while running.poll() is None and not all(of_kind(host, kind) for kind in kinds):
        time.sleep(0.1)  # between two looks
    with suppress(subprocess.TimeoutExpired):
        running.wait(draw.uniform(0, LONGEST_S))
    there = [of_kind(host, kind) for kind in kinds] if running.poll() is None else []
    return [draw.choice(processes) for processes in there if processes]


def left_behind(host: Host, folder: RunFolder, patience_s: float = 180) -> list[str]:
    """Processes and shared memory that are still there after a while, and files that were only there for a moment."""
    deadline = time.monotonic() + patience_s
    while (alive := processes_on(host)) and time.monotonic() < deadline:
        time.sleep(0.5)  # between two looks: Ray's agents notice by themselves that they are alone
    found = [text for process in alive if (text := _described(process))]
    memory = subprocess.run(host.inside(["ls", "-A", "/dev/shm"]), capture_output=True, text=True, check=True)
    found += [f"shared memory {name}" for name in memory.stdout.split()]
    passing = (".draft", ".replaced", ".replacing", "swapped")
    found += [f"file {path}" for path in folder.path.rglob("*") if any(mark in path.name for mark in passing)]
    temporary = host.home / "tmp"
    return found + [f"temporary file {path}" for path in temporary.rglob("*") if path.is_file()]


def _described(process: psutil.Process) -> str:
    try:
        age_s, words = time.time() - process.create_time(), " ".join(process.cmdline()).strip()
        return f"process {process.pid} of {process.ppid()}, {process.status()}, {age_s:.0f} s old: {words[-100:]}"
    except psutil.NoSuchProcess:
        return ""


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the optimizer's included, by its name."""
    found: dict = {}
    _load_state_dict(found, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return dict(_tensors("", found))


def _tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(f"{name}/{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _tensors(f"{name}/{i}", inner)
