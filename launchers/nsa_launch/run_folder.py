"""A run's folder: what the launcher keeps there, and who may start in it.

config.yaml       the whole configuration, as it was checked; itself a CONFIG.yaml
latest.json       names the last complete checkpoint: the only authority on where a resumed run begins
metrics.jsonl     one line a logged step
launches.jsonl    starts, failures and stops, one line each
topology.json     which rank ran where, under which process id
logs/rank-*.log   what each rank wrote to stdout and stderr
STOP              its appearance asks for a checkpoint and an end; `touch` it from anywhere
ray/              Ray Train's own folder, a new one for each launch
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from nsa_launch.config import RunConfig


@dataclass(frozen=True)
class RunFolder:
    """Names inside `output_dir`."""

    path: Path

    @property
    def latest(self) -> Path:
        return self.path / "latest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

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
    def ray(self) -> Path:
        return self.path / "ray"

    def rank_log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank-{rank:04d}.log"

    def record(self, event: str, **details: Any) -> None:
        """Append one line to launches.jsonl; one short write, so that several processes may do so."""
        line = json.dumps({"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **details})
        with self.launches.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def latest_checkpoint(self) -> Mapping[str, Any] | None:
        """What latest.json says, or None before the first checkpoint."""
        if not self.latest.exists():
            return None
        return json.loads(self.latest.read_text(encoding="utf-8"))


@contextmanager
def claimed(config: RunConfig) -> Iterator[RunFolder]:
    """The folder of `config`, ready for a launch and locked against a second one while the context lasts.

    Raises ValueError when another launch is at work there, or when the folder holds a run that was not to be resumed.
    """
    folder = RunFolder(config.run.output_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another launch is at work in {folder.path}, and two would overwrite each other's checkpoints; "
                f"stop it (touch {folder.stop}) or take another output_dir"
            ) from None
        refuse_to_overwrite(folder, config.run.resume)
        prepare(folder, config)
        yield folder


def refuse_to_overwrite(folder: RunFolder, resume: bool) -> None:
    """ValueError when a run has begun in the folder and `resume` does not ask to go on with it."""
    started = [path.name for path in (folder.latest, folder.metrics) if path.exists()]
    if started and not resume:
        raise ValueError(
            f"{folder.path} already holds a run ({' and '.join(started)}), and a new one would mix with it; "
            f"go on with resume=true, or take another output_dir=PATH"
        )


def prepare(folder: RunFolder, config: RunConfig) -> None:
    """Take away an old STOP and write down what is about to run."""
    folder.stop.unlink(missing_ok=True)
    (folder.path / "logs").mkdir(exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (folder.path / "config.yaml").write_text(text, encoding="utf-8")
