"""Reading a JSON-lines file that other processes are still writing."""

import json
from pathlib import Path
from typing import Any


class Follower:
    """Hands out the complete lines that were appended since the last call. The file may not exist yet."""

    def __init__(self, path: Path, from_start: bool = False) -> None:
        self._path = path
        self._offset = 0 if from_start or not path.exists() else path.stat().st_size

    def read(self) -> list[dict[str, Any]]:
        """New records, oldest first. A line without its newline is left for the next call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            if self._path.stat().st_size < self._offset:
                self._offset = 0  # the writer began anew
            file.seek(self._offset)
            data = file.read()
        complete, newline, _ = data.rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return [json.loads(line) for line in complete.splitlines() if line.strip()]
