"""What was measured, written as it comes: figures as JSON, a table as text."""

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nsa_dist.train.files.atomic import write_atomically

GIB = 2**30
Row = dict[str, Any]


def machine(device_type: str, num_devices: int, ranks: str) -> Row:
    """Where and how these figures come about. `ranks` says in words which processes measured."""
    on_gpu = device_type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    return {
        "device": name,
        "num_devices": num_devices,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "ranks": ranks,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["nsa-dist", *sys.argv[1:]]),
    }


class Report:
    """`FOLDER/NAME.json` and `FOLDER/NAME.txt`; both are whole after every row, so an early end loses nothing."""

    def __init__(self, folder: Path, about: Row, name: str = "cp") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.data: dict[str, Any] = {"machine": about, "not_run": []}
        self._text = folder / f"{name}.txt"
        self._json = folder / f"{name}.json"
        self._text.write_text("")
        self.say(
            f"{about['num_devices']} x {about['device']}, {about['ranks']}, torch {about['torch']}, {about['date']}"
        )

    @property
    def source(self) -> str:
        """Of these figures, in words."""
        about = self.data["machine"]
        return f"{about['command']} on {about['num_devices']} x {about['device']}, {about['date']}"

    def add(self, section: str, row: Row, line: str) -> None:
        """Keep a row of a section, and show its line."""
        self.data.setdefault(section, []).append(row)
        self.say(line)
        self._write()

    def leave_out(self, name: str, reason: str) -> None:
        self.data["not_run"].append({"what": name, "why": reason})
        self.say(f"not run: {name}: {reason}")
        self._write()

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self._text.open("a") as file:
            file.write(text + "\n")

    def failed(self) -> bool:
        """Whether a comparison with one rank, of layers or of training, found a difference.

        An error of a mode is a finding, not a failure.
        """
        return any(row.get("wrong") for section in ("checks", "training") for row in self.data.get(section, []))

    def _write(self) -> None:
        write_atomically(self._json, json.dumps(self.data, indent=1) + "\n")


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def gib(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}"
