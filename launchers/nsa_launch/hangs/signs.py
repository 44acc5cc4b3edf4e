"""Signs of life: what each rank says of itself every second or so, in a file of the run's folder.

A rank overwrites its one record in place, so that a file costs one small write a beat. A process that is stopped, or
whose every thread is stuck, writes no more: its file grows old beside the others'.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

_BYTES = 4096  # of a record, padded with spaces
_SILENT_BEATS = 3  # so many missed ones are silence
_RANKS_A_SECOND = 64  # that write into one folder
ALIVE, FAILED, ENDED = "alive", "failed", "ended"


@dataclass(frozen=True)
class Sign:
    """What one rank said last. `written_s` is the time of its file, by the clock of where the folder lies."""

    rank: int
    host: str
    pid: int
    beat_s: float  # from one sign to the next
    phase: str  # of `Hooks.on_phase`
    step: int
    phase_s: float  # since it began
    usual_s: float | None  # that this phase has taken lately
    where: list[str] = field(default_factory=list)  # frames, innermost first
    waits: bool = False  # in a collective
    begun: dict[str, int] = field(default_factory=dict)  # collectives, by group
    state: str = ALIVE
    written_s: float = 0.0


def beat_s(num_ranks: int) -> float:
    """From one sign of a rank to its next, in a run of so many."""
    return max(1.0, num_ranks / _RANKS_A_SECOND)


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.json"


def write(folder: Path, sign: Sign) -> None:
    """OSError where the folder cannot be written to."""
    raw = asdict(sign)
    raw.pop("written_s")
    while len(record := json.dumps(raw).encode()) >= _BYTES:
        raw = {**raw, "where": raw["where"][:-1], "begun": {}}
    handle = os.open(path_of(folder, sign.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, record.ljust(_BYTES - 1) + b"\n", 0)
    finally:
        os.close(handle)  # over NFS what is written shows from now on


def read(folder: Path, rank: int) -> Sign | None:
    """The last sign of a rank; None if it has given none, or it is being written just now."""
    path = path_of(folder, rank)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        names = {each.name for each in fields(Sign)}
        return Sign(**{name: raw[name] for name in names & raw.keys()}, written_s=path.stat().st_mtime)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def read_all(folder: Path, ranks: Iterable[int]) -> list[Sign]:
    """Of those that have given one."""
    return [sign for rank in ranks if (sign := read(folder, rank)) is not None]


def silence_s(sign: Sign, signs: Sequence[Sign]) -> float:
    """For how long a living rank has said nothing while others did; 0 if it is within its beat."""
    silent = max(other.written_s for other in signs) - sign.written_s
    return silent if sign.state == ALIVE and silent > _SILENT_BEATS * sign.beat_s else 0.0
