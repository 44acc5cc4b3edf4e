"""Writing the numbers of a run: JSON lines for programs, TensorBoard events for people. `records` reads them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from nsa_dist.train.files.records import Record


class MetricsLog:
    """Writes every record to `metrics.jsonl`, one object a line, and to TensorBoard.

    TensorBoard's name of a number is its path in the record: `train/loss`, `traffic/layers/1/sent_bytes/pages`. The
    file only ever grows: after a resume some steps occur twice, and the later line counts.
    """

    def __init__(self, path: Path, tensorboard: Path, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(path)
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(tensorboard), purge_step=first_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._events.close()

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        step = int(record["step"])
        for name, value in record.items():
            if name not in ("kind", "step"):
                for path, number in _numbers(f"{record['kind']}/{name}", value):
                    self._events.add_scalar(path, number, step)


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings and lists, each with its path."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(f"{path}/{name}", inner)
    elif isinstance(value, list):
        yield from _numbers(path, dict(enumerate(value)))
    elif isinstance(value, int | float):
        yield path, value


def _end_torn_line(path: Path) -> None:
    """Drop what a killed process left of its last line."""
    if path.exists():
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))
