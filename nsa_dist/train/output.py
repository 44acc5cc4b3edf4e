"""The files of one run: where they lie, and which checkpoint counts."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from nsa_dist.train.atomic import write_atomically
from nsa_dist.train.config import RunSection, TrainConfig

KEPT_FILES = ("latest.json", "metrics.jsonl", "checkpoints", "tensorboard", "data", "loss.png", "selection.png")


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

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None before the first."""
        if not self.latest.exists():
            return None
        return self.root / json.loads(self.latest.read_text())["checkpoint"]

    def set_latest(self, step: int) -> None:
        """Name the checkpoint of `step`; a reader sees the old name or the new one, never half of one."""
        path = self.checkpoint(step).relative_to(self.root)
        write_atomically(self.latest, json.dumps({"step": step, "checkpoint": str(path)}) + "\n")

    def drop_old_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints; the one `latest.json` names always stays."""
        latest = self.latest_checkpoint()
        for old in sorted(self.checkpoints.glob("step_*"))[:-keep]:
            if old != latest:
                shutil.rmtree(old)


def prepare_output(config: TrainConfig) -> None:
    """Make `output_dir` ready. Call it once, in one process, before the ranks of a run start.

    ValueError if it holds a run and neither resume nor overwrite says what to do with it.
    """
    run = config.run
    output = OutputDir(run.output_dir)
    if run.overwrite:
        _remove_run(output)
    elif not run.resume:
        check_empty(run)
    output.root.mkdir(parents=True, exist_ok=True)


def check_empty(run: RunSection) -> None:
    """ValueError if `output_dir` holds a run already."""
    held = [name for name in ("latest.json", "metrics.jsonl") if (run.output_dir / name).exists()]
    if held:
        raise ValueError(
            f"output_dir={run.output_dir} already holds a run ({', '.join(held)}), which a new one would mix with; "
            f"set resume=true to go on with it, overwrite=true to replace it, or another output_dir"
        )


def _remove_run(output: OutputDir) -> None:
    output.latest.unlink(missing_ok=True)  # first: from here on no checkpoint counts
    for name in KEPT_FILES:
        path = output.root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
