"""What Ray is told of a run: each checkpoint, and on rank 0 every record."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ray.train

from nsa_dist.train.files.records import Record
from nsa_launch.on_ray.shown.prometheus import RunMetrics
from nsa_launch.ranks.hooks import FolderHooks
from nsa_launch.run_folder import RunFolder


class RayHooks(FolderHooks):
    """Tells Ray Train of each checkpoint as well, so that its `Result` and dashboard show the run's progress.

    Ray gets a pointer, one small file, never the checkpoint: its own record of the latest one may lag behind a crash
    and is not what a restart reads. Each report blocks for one poll of the controller, hence none per step.
    """

    def __init__(self, folder: RunFolder, rank: int) -> None:
        super().__init__(folder)
        self._rank = rank
        self._metrics = RunMetrics(folder.path.name)

    def on_metrics(self, record: Record) -> None:
        self._metrics.feed(record)

    def on_checkpoint(self, step: int, path: Path, metrics: Mapping[str, float]) -> None:
        report = {"step": step, **metrics}
        if self._rank != 0:
            ray.train.report(report)
            return
        with tempfile.TemporaryDirectory() as pointer:
            (Path(pointer) / "pointer.json").write_text(json.dumps({"path": str(path), **report}), encoding="utf-8")
            checkpoint = ray.train.Checkpoint.from_directory(pointer)
            ray.train.report(report, checkpoint=checkpoint, checkpoint_dir_name=f"pointer-{step:08d}")
