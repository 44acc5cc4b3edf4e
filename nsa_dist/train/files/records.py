"""The records of `metrics.jsonl` as another process, or the same one later, reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# `kind`, `step`, and by name numbers, or mappings and lists of them. The kinds: "start" (how the sequence is shared),
# "train", "traffic" (what `nsa_dist.train.traffic` says of a step), "validation".
Record = Mapping[str, Any]


class MetricsFollower:
    """Reads a growing `metrics.jsonl`, of this process or another one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def poll(self) -> list[dict]:
        """The records whose lines are complete and new since the last call; none while there is no file."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


def read_metrics(path: Path, kind: str) -> list[dict]:
    """The records of a kind in order of their steps, each step once, as it was written last."""
    by_step = {record["step"]: record for record in MetricsFollower(path).poll() if record["kind"] == kind}
    return [by_step[step] for step in sorted(by_step)]
