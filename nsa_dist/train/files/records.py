"""The records of `metrics.jsonl` as another process, or the same one later, reads them.

The file is no authority: nothing of a run depends on a line of it. One that a crash tore or a disk spoiled is passed
over and counted, and so is a record without what every reader of its kind needs.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# `kind`, `step`, and by name numbers, or mappings and lists of them. The kinds: "start" (how the sequence is shared),
# "train", "traffic" (what `nsa_dist.train.traffic` says of a step), "validation", "health" (`nsa_dist.train.health`),
# "not_finite" (a step that moved no weight, and what was done), "tasks" (`nsa_dist.train.tasks.score`), "far_context"
# (`nsa_dist.train.data.far`).
Record = Mapping[str, Any]

_WITH_LOSS = ("train", "validation")


class MetricsFollower:
    """Reads a growing `metrics.jsonl`, of this process or another one. `num_skipped`: lines that were none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.num_skipped = 0

    def poll(self) -> list[dict]:
        """The records whose lines are complete and new since the last call; none while there is no file."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = [_parsed(line) for line in whole.split(b"\n") if line.strip()]
        found = [record for record in records if record is not None]
        self.num_skipped += len(records) - len(found)
        return found


def read_metrics(path: Path, kind: str) -> list[dict]:
    """The records of a kind in order of their steps, each step once, as it was written last."""
    return by_kind(MetricsFollower(path).poll()).get(kind, [])


def by_kind(records: Iterable[dict]) -> dict[str, list[dict]]:
    """Those that are whole, each kind's in order of their steps, each step once, as it was written last."""
    found: dict[str, dict[int, dict]] = {}
    for record in records:
        if isinstance(kind := record.get("kind"), str) and _is_whole(record):
            found.setdefault(kind, {})[record["step"]] = record
    return {kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in found.items()}


def _parsed(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: not JSON, not UTF-8, or a number of thousands of digits
        return None
    return record if isinstance(record, dict) else None


def _is_whole(record: Record) -> bool:
    needed = ("step", "loss") if record["kind"] in _WITH_LOSS else ("step",)
    return all(isinstance(record.get(name), int | float) for name in needed)
