"""The files of one run: where they lie, and which checkpoint counts."""

import json
import os
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from nsa_dist.train.data.corpus import PACKED_FILES
from nsa_dist.train.files import candidates, manifest
from nsa_dist.train.files.atomic import sync_folder, write_atomically
from nsa_dist.train.files.candidates import Candidates, Damaged, name_of, steps_of
from nsa_dist.train.files.manifest import Manifest
from nsa_dist.train.files.marker import RunMarker, found, remove
from nsa_dist.train.refused import Refused

# What a run makes in its folder beside its checkpoints, which `run.json` lists one by one.
MADE = (
    "latest.json", "metrics.jsonl", "loss.png", "selection.png", "data/corpus.json",
    *(f"data/{name}" for name in PACKED_FILES), "tensorboard/events.out.tfevents.*",
)  # fmt: skip


@dataclass(frozen=True)
class OutputDir:
    """Names below `run.output_dir`. `files.candidates` says which checkpoint is complete and newest."""

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
        return self.root / name_of(step)

    def marker(self) -> RunMarker:
        """The run's marker. ValueError where no run was begun."""
        marker = RunMarker.read(self.root)
        if marker is None:
            raise ValueError(
                f"{self.root} has no run.json, which says what the run is and made; begin it with "
                f"nsa_dist.train.prepare.prepare_output"
            )
        return marker

    def candidates(self) -> Candidates:
        """What may be gone on from. ValueError for a `run.json` that is not ours."""
        marker = RunMarker.read(self.root)
        return Candidates(None, (), (), (), False) if marker is None else candidates.look(self.root, marker)

    def checkpointed_step(self) -> int:
        """The step after which the newest checkpoint was taken, as far as names and sizes say; 0 before the first."""
        return self.candidates().newest

    def complete(self, made: Manifest) -> None:
        """The checkpoint of which all is written counts from now on, and `latest.json` names it."""
        marker = self.marker()
        if not marker.manifests:
            marker.changed(manifests=True).write(self.root)
        made.write(self.checkpoint(made.step))
        sync_folder(self.checkpoints)
        self.set_latest(made.step)

    def set_aside(self, damaged: Damaged) -> str:
        """Rename a checkpoint to `step_00000006.damaged`, where nothing but overwriting removes it; the new name."""
        marker, name = self.marker(), name_of(damaged.step)
        if name not in marker.made or not os.path.lexists(self.root / name):
            return ""
        aside, others = f"{name}.damaged", count(2)
        while os.path.lexists(self.root / aside):
            aside = f"{name}.damaged-{next(others)}"
        marker.changed(made=tuple(dict.fromkeys([*marker.made, aside]))).write(self.root)
        os.rename(self.root / name, self.root / aside)
        sync_folder(self.checkpoints)
        return aside

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
        """Remove all but the newest `keep` of the run's checkpoints; the one `latest.json` names always stays.

        What is not complete takes no complete one's place; what was set aside stays.
        """
        marker, seen = self.marker(), self.candidates()
        steps = steps_of(marker.made)
        there = [step for step in steps if os.path.lexists(self.checkpoint(step))]
        complete = [step for step in there if (self.checkpoint(step) / manifest.NAME).is_file()]
        kept = {*there[:keep], *complete[:keep], *([seen.latest.step] if seen.latest else [])}
        old = [name_of(step) for step in steps if step not in kept]
        for path in found(self.root, old):
            remove(path)
        if old:
            marker.changed(made=tuple(name for name in marker.made if name not in old)).write(self.root)
