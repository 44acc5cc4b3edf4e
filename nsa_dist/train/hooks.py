"""The few questions a training run asks of whatever launched it. It knows nothing else of its launcher."""

import sys
from collections.abc import Mapping
from pathlib import Path

from nsa_dist.train.files.records import Record


class Hooks:
    """Answers of a launcher that has nothing to say; subclass and override."""

    def should_stop(self) -> bool:
        """Asked on rank 0 before every step. True: save a checkpoint after this step and return."""
        return False

    def on_checkpoint(self, step: int, path: Path, metrics: Mapping[str, float]) -> None:
        """Told on every rank once the checkpoint of `step` at `path` is complete: it has its manifest."""

    def on_metrics(self, record: Record) -> None:
        """Given, on rank 0, every record as it is written to metrics.jsonl."""

    def on_notice(self, text: str) -> None:
        """Given, on rank 0, what people should read once in a run, such as that Megatron-core drops a part."""
        print(text, file=sys.stderr, flush=True)

    def on_phase(self, phase: str, step: int) -> None:
        """Told on every rank what it begins; no time to speak of may be spent here.

        "step": to be made. "start", "validation", "checkpoint", "rewind", "pictures": after `step` of them.
        """
