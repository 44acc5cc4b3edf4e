"""`run.json`: the marker of a run in its folder. It says which run this is and names all that the run made there.

Only what a marker names is ever removed, so a folder of the user's loses nothing but what a run wrote into it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import uuid4

from nsa_dist.train.files.atomic import write_atomically
from nsa_dist.train.refused import Refused

NAME = "run.json"
FORMAT, VERSION = "nsa-dist run", 1


@dataclass(frozen=True)
class RunMarker:
    """What `run.json` holds.

    `made` are names and patterns below the folder, at most one folder deep. `identity` are the keys that may not change
    and `settings` those that may, as the last start had them; `corpus` is the digest of the packed texts, "" before.
    """

    run_id: str
    begun: str
    made: tuple[str, ...]
    identity: Mapping[str, Any]
    settings: Mapping[str, Any]
    corpus: str = ""
    notices: tuple[str, ...] = ()  # given once already
    manifests: bool = False  # whether a checkpoint without one is none: from the first that has one

    @classmethod
    def new(cls, made: Sequence[str], identity: Mapping[str, Any], settings: Mapping[str, Any]) -> "RunMarker":
        return cls(uuid4().hex, datetime.now(UTC).isoformat(timespec="seconds"), tuple(made), identity, settings)

    @classmethod
    def read(cls, folder: Path) -> "RunMarker | None":
        """The marker in `folder`, None where there is none. ValueError for a `run.json` that is not ours."""
        path = folder / NAME
        if not os.path.lexists(path):
            return None
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("sha256", None) not in (None, _digest(raw)):  # None: written before there was one
                raise ValueError("what it says and its own SHA-256 differ")
            if (raw.pop("format"), raw.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"format {FORMAT!r}, version {VERSION}, was expected")
            if not all(_is_below(name) for name in raw["made"]):
                raise ValueError("it names what lies outside of the folder")
            marker = cls(**raw)
            return replace(marker, made=tuple(marker.made), notices=tuple(marker.notices))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Refused(
                f"{path} is not the marker of a run that this version can read ({type(error).__name__}: {error}), so "
                f"nothing says which files here are a run's; if it was damaged, put it back from a copy; else take "
                f"another output_dir, or move that file away"
            ) from None

    def write(self, folder: Path) -> "RunMarker":
        """Replace `run.json` in `folder` at once."""
        raw = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_atomically(folder / NAME, json.dumps({**raw, "sha256": _digest(raw)}, indent=1) + "\n")
        return self

    def changed(self, **values: Any) -> "RunMarker":
        assert values.keys() <= {field.name for field in fields(self)}
        return replace(self, **values)


def _digest(raw: Mapping[str, Any]) -> str:
    """Of all that it says, so that a flipped bit does not make another run of it, or lose one of its checkpoints."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def holds_run(folder: Path) -> bool:
    """Whether the folder has a marker that this version can read."""
    try:
        return RunMarker.read(folder) is not None
    except Refused:  # another's run.json
        return False


def found(folder: Path, names: Sequence[str]) -> list[Path]:
    """What exists of `names` (patterns of the last part) below `folder`; a symbolic link counts as itself."""
    paths = []
    for name in names:
        where, _, last = name.rpartition("/")
        if (folder / where).is_dir():
            entries = sorted(os.listdir(folder / where))
            paths += [folder / where / entry for entry in entries if fnmatchcase(entry, last)]
    return paths


def containers(names: Sequence[str]) -> list[str]:
    """The folders in which `names` lie."""
    return sorted({name.rpartition("/")[0] for name in names} - {""})


def remove(path: Path) -> None:
    """A file, a link or a folder; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_below(name: str) -> bool:
    parts = name.split("/")
    return 1 <= len(parts) <= 2 and not {"", ".", ".."} & set(parts) and not set(parts[0]) & set("*?[")
