"""A run's folder: what the launcher adds to `nsa_dist.train.files.output`, and who may start there.

config.yaml       the whole configuration, as it was checked; itself a CONFIG.yaml, without resume and overwrite
launches.jsonl    launches, starts, failures and ends, one line each
topology.json     which rank ran where, under which process id
logs/rank-*.log   what each rank wrote to stdout and stderr
report.html       the run on one page, written when it ends (`nsa_launch.report`)
pulses/           the last sign of life of each rank: `nsa_launch.hangs.signs`
STOP              its appearance asks for a checkpoint and an end; `touch` it from anywhere
ray/              Ray Train's own folder, a new one for each launch
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from nsa_dist.train.files.atomic import write_atomically
from nsa_dist.train.files.lock import lock as hold
from nsa_dist.train.files.output import MADE, OutputDir
from nsa_dist.train.prepare import check_output, prepare_output
from nsa_dist.train.refused import Refused
from nsa_launch.config import RunConfig

# What a launched run makes beside what the trainer does. `.lock` stays.
LAUNCHED = (
    *MADE,
    "config.yaml",
    "launches.jsonl",
    "topology.json",
    "logs/rank-*.log",
    "pulses/rank-*.json",
    "ray/launch-*",
    "report.html",
)
_LONGEST_STOP = len("SIGTERM")  # what a launch writes into it
# Reasons in a "failure" event; the first also of a process that the kernel killed for its memory.
PROCESS_DIED = "its process died"
OUT_OF_MEMORY = "Ray's memory monitor killed it, as its node was short of memory"
MORE_MEMORY = (
    "start fewer ranks on a node (launch.processes_per_node), give the nodes more memory, or start Ray with "
    "RAY_memory_monitor_refresh_ms=0, which leaves the choice of what dies to the machine"
)


@dataclass(frozen=True)
class RunFolder:
    """Names inside `output_dir`."""

    path: Path

    @property
    def output(self) -> OutputDir:
        """The trainer's part of the folder."""
        return OutputDir(self.path)

    @property
    def launches(self) -> Path:
        return self.path / "launches.jsonl"

    @property
    def topology(self) -> Path:
        return self.path / "topology.json"

    @property
    def stop(self) -> Path:
        return self.path / "STOP"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def pulses(self) -> Path:
        return self.path / "pulses"

    def ranks(self) -> range:
        """Those of the last start; none before the first."""
        try:
            return range(len(json.loads(self.topology.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            return range(0)

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:04d}.log"

    def record(self, event: str, **details: Any) -> None:
        """Append one line to launches.jsonl; one short write, so that several processes may do so.

        It begins on a line of its own, even if a process died within the line before.
        """
        line = json.dumps({"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **details})
        with self.launches.open("a+b") as file:
            is_torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * is_torn + line.encode() + b"\n")

    def checkpointed_step(self) -> int:
        """The step after which the newest complete checkpoint was taken; 0 before the first."""
        return self.output.checkpointed_step()


def check(config: RunConfig) -> RunFolder:
    """The folder of `config`, as it is. ValueError as `claimed`, but for what only the lock tells."""
    folder = RunFolder(config.run.output_dir)
    check_output(config, LAUNCHED)
    _check_stop(folder)
    return folder


@contextmanager
def claimed(config: RunConfig) -> Iterator[RunFolder]:
    """The folder of `config`, ready for a launch and locked against a second one while the context lasts.

    ValueError when another launch is at work there, when the folder cannot be made, or when the run cannot start there
    (`nsa_dist.train.prepare.check_output`): then nothing in it has changed.
    """
    folder = check(config)
    with _opened_lock(folder) as lock:
        _lock(lock, folder)
        with _refusing(folder):
            prepare_output(config, LAUNCHED)
            _prepare(folder, config)
        yield folder


def _check_stop(folder: RunFolder) -> None:
    """A STOP from before may be taken away, one with something in it may not: a scheduler touches it at any time."""
    path = folder.stop
    if os.path.lexists(path) and not (path.is_file() and path.stat().st_size <= _LONGEST_STOP):
        raise Refused(
            f"{path} is more than the empty file that asks a run for its end, and a start would remove it; move it "
            f"away, or take another output_dir"
        )


def _opened_lock(folder: RunFolder) -> TextIO:
    with _refusing(folder):
        folder.path.mkdir(parents=True, exist_ok=True)
        return (folder.path / ".lock").open("a")  # nothing is written to it: it may be another's


@contextmanager
def _refusing(folder: RunFolder) -> Iterator[None]:
    """What the file system has against the run's files is a refusal as long as nothing has started."""
    try:
        yield
    except OSError as error:
        raise Refused(
            f"output_dir={folder.path} cannot be used ({error.strerror}: {error.filename}), and the run's files go "
            f"there; name a folder that can be written to"
        ) from None


def _lock(lock: TextIO, folder: RunFolder) -> None:
    try:
        error = hold(lock)
    except BlockingIOError:
        raise Refused(
            f"another launch is at work in {folder.path}, and two would overwrite each other's checkpoints; "
            f"stop it (touch {folder.stop}) or take another output_dir"
        ) from None
    if error is not None:  # a file system without locks is fit for runs all the same
        print(f"{folder.path} cannot be locked ({error.strerror}): mind that no second launch starts there", flush=True)


def _prepare(folder: RunFolder, config: RunConfig) -> None:
    """Take away an old STOP; write down what is about to run, without what was to be done with the folder this time."""
    folder.stop.unlink(missing_ok=True)
    folder.logs.mkdir(exist_ok=True)
    folder.pulses.mkdir(exist_ok=True)
    for path in folder.pulses.glob("rank-*.json"):
        path.unlink()
    written = config.model_dump(mode="json", exclude={"run": {"resume", "overwrite"}})
    mode = 0o600 if config.launch.env else None  # a name may hide a secret from `is_secret`
    write_atomically(folder.path / "config.yaml", yaml.safe_dump(written, sort_keys=False), mode)
