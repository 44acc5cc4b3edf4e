"""The launcher's answers to the trainer: a STOP file for everyone, and a word to Ray Train at each checkpoint."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_dist.train.hooks import Hooks
from nsa_launch.run_folder import RunFolder

if TYPE_CHECKING:
    from nsa_launch.hangs.pulse import Pulse  # which needs Megatron-core, and the driver imports this file


class FolderHooks(Hooks):
    """Stops when `STOP` appears in the run's folder, whoever put it there."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.pulse: Pulse | None = None

    def on_phase(self, phase: str, step: int) -> None:
        if self.pulse is not None:
            self.pulse.begins(phase, step)

    def should_stop(self) -> bool:
        return self._folder.stop.exists()

    def on_notice(self, text: str) -> None:
        self._folder.record("notice", text=text)  # which the console shows


class RayHooks(FolderHooks):
    """Tells Ray Train of each checkpoint as well, so that its `Result` and dashboard show the run's progress.

    Ray gets a pointer, one small file, never the checkpoint: its own record of the latest one may lag behind a crash
    and is not what a restart reads. Each report blocks for one poll of the controller, hence none per step.
    """

    def __init__(self, folder: RunFolder, rank: int) -> None:
        super().__init__(folder)
        self._rank = rank

    def on_checkpoint(self, step: int, path: Path, metrics: Mapping[str, float]) -> None:
        import ray.train

        report = {"step": step, **metrics}
        if self._rank != 0:
            ray.train.report(report)
            return
        with tempfile.TemporaryDirectory() as pointer:
            (Path(pointer) / "pointer.json").write_text(json.dumps({"path": str(path), **report}), encoding="utf-8")
            checkpoint = ray.train.Checkpoint.from_directory(pointer)
            ray.train.report(report, checkpoint=checkpoint, checkpoint_dir_name=f"pointer-{step:08d}")
