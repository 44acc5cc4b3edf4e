"""The files of one run: where they lie, and which checkpoint counts."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from nsa_dist.train.config_errors import Refused
from nsa_dist.train.data.corpus import PACKED_FILES
from nsa_dist.train.files.atomic import write_atomically
from nsa_dist.train.files.marker import RunMarker, found, remove

# What a run makes in its folder beside its checkpoints, which `run.json` lists one by one.
MADE = (
    "latest.json", "metrics.jsonl", "loss.png", "selection.png", "data/corpus.json",
    *(f"data/{name}" for name in PACKED_FILES), "tensorboard/events.out.tfevents.*",
)  # fmt: skip
ANY_CHECKPOINT = "checkpoints/step_" + 8 * "[0-9]"


@dataclass(frozen=True)
class OutputDir:
    """Names below `run.output_dir`. `latest.json` alone says which checkpoint is complete and newest."""

    root: Path

    @property
    def latest(self) -> Path:
        return self.root / "latest.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def marker(self) -> RunMarker:
        """The run's marker. ValueError where no run was begun."""
        marker = RunMarker.read(self.root)
        if marker is None:
            raise ValueError(
                f"{self.root} has no run.json, which says what the run is and made; begin it with "
                f"nsa_dist.train.prepare.prepare_output"
            )
        return marker

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None before the first."""
        if not self.latest.exists():
            return None
        return self.root / json.loads(self.latest.read_text())["checkpoint"]

    def checkpointed_step(self) -> int:
        """The step after which it was taken; 0 before the first."""
        return json.loads(self.latest.read_text())["step"] if self.latest.exists() else 0

    def set_latest(self, step: int) -> None:
        """Name the checkpoint of `step`; a reader sees the old name or the new one, never half of one."""
        path = self.checkpoint(step).relative_to(self.root)
        write_atomically(self.latest, json.dumps({"step": step, "checkpoint": str(path)}) + "\n")

    def make_checkpoint(self, step: int) -> Path:
        """An empty folder for the checkpoint of `step`, named in the marker before it is made.

        ValueError if something is there that the run did not make; what an interrupted attempt left is removed.
        """
        path, marker = self.checkpoint(step), self.marker()
        name = path.relative_to(self.root).as_posix()
        if name in marker.made:
            remove(path)
        elif os.path.lexists(path):
            raise Refused(
                f"{path} is there, and this run did not make it, so it is not overwritten; move it away, and go on "
                f"with resume=true"
            )
        else:
            marker.changed(made=(*marker.made, name)).write(self.root)
        path.mkdir(parents=True)
        return path

    def drop_old_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep` of the run's checkpoints; the one `latest.json` names always stays."""
        latest, marker = self.latest_checkpoint(), self.marker()
        listed = sorted(name for name in marker.made if name.startswith("checkpoints/"))
        old = [name for name in listed[:-keep] if self.root / name != latest]
        for path in found(self.root, old):
            remove(path)
        if old:
            marker.changed(made=tuple(name for name in marker.made if name not in old)).write(self.root)
