"""`manifest.json` of a checkpoint: what its files were when they were written. Without one it is not complete.

    {"format": "nsa-dist checkpoint", "version": 1, "run_id": "8f...", "step": 6, "samples": 24, "sha256": "c3...",
     "files": {".metadata": {"bytes": 5120, "sha256": "9a..."}, "__0_0.distcp": ...}}

The outer `sha256` is of all the rest, so that damage of the manifest is told from damage of a file. Digests are taken
right after a file was written, by the process that wrote it, mostly out of the page cache; the manifest comes last.

A manifest finds what disks, copies and crashes do. It is no signature: whoever can write into the folder can write a
manifest as well, and `.metadata` is a pickle, which PyTorch's reader executes. Take checkpoints of people you trust.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nsa_dist.train.files.atomic import write_atomically

NAME = "manifest.json"
FORMAT, VERSION = "nsa-dist checkpoint", 1
READ_BY_NAME = (".metadata", "metadata.json", "common.pt")  # by Megatron-core and PyTorch, wherever they find them
ALWAYS_THERE = READ_BY_NAME[:2]  # from Megatron-core 0.17 on the third is inside of another file
_SHARD = re.compile(r"__(\d+)_\d+\.distcp")  # the writer's rank


class DamagedError(ValueError):
    """A manifest that cannot be believed; the message starts with its file's name."""


class Entry(NamedTuple):
    """One file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds."""

    run_id: str
    step: int
    samples: int
    files: Mapping[str, Entry]  # by name in the checkpoint's folder

    def write(self, folder: Path) -> None:
        """Make the checkpoint in `folder` complete, at once."""
        write_atomically(folder / NAME, self._text())

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest in `folder`, None where there is none. DamagedError for one that is not as it was written."""
        path = folder / NAME
        if not os.path.lexists(path):
            return None
        try:
            text = path.read_text(encoding="utf-8")
            raw = json.loads(text)
            if (raw.pop("format"), raw.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"format {FORMAT!r}, version {VERSION}, was expected")
            del raw["sha256"]
            files = {name: Entry(**entry) for name, entry in raw.pop("files").items()}
            manifest = cls(**raw, files=files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{NAME} cannot be read ({type(error).__name__}: {error})") from None
        if text != manifest._text():
            raise DamagedError(f"{NAME} is not as it was written (what it says and its own SHA-256 differ)")
        return manifest

    @property
    def digest(self) -> str:
        """SHA-256 of all that it says."""
        return hashlib.sha256(json.dumps(self._raw(), sort_keys=True).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def _text(self) -> str:
        return json.dumps({**self._raw(), "sha256": self.digest}, indent=1) + "\n"

    def _raw(self) -> dict[str, Any]:
        files = {name: entry._asdict() for name, entry in self.files.items()}
        return {"format": FORMAT, "version": VERSION, **asdict(self), "files": files}


def written_by(rank: int, num_ranks: int, folder: Path) -> dict[str, Entry]:
    """The files in `folder` that `rank` wrote (process 0: and all that bear no rank), on the disk and with digests."""
    names = [path.name for path in folder.iterdir() if _writer(path.name, num_ranks) == rank]
    return dict(zip(names, _in_threads(lambda name: entry_of(folder / name, sync=True), names), strict=True))


def entry_of(path: Path, sync: bool = False) -> Entry:
    """Size and digest of what the file holds; with `sync` its bytes are on the disk afterwards. OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        size = file.tell()
        if sync:
            os.fsync(file.fileno())
    return Entry(size, digest.hexdigest())


def wrong_at_sight(manifest: Manifest, folder: Path, run_id: str, step: int) -> list[str]:
    """What names and sizes show to be wrong with the checkpoint of `step` in `folder`; nothing is read but the names.

    More files than the manifest names are fine, unless a reader would take them for the checkpoint's.
    """
    if manifest.run_id != run_id:
        return [f"{NAME} is of another run ({manifest.run_id}; this one is {run_id})"]
    if manifest.step != step:
        return [f"{NAME} is of step {manifest.step}"]
    wrong = [f"{NAME} does not name {name}" for name in ALWAYS_THERE if name not in manifest.files]
    unlisted = [name for name in READ_BY_NAME if name not in manifest.files and os.path.lexists(folder / name)]
    wrong += [f"{name} is there, and {NAME} does not name it" for name in unlisted if name not in ALWAYS_THERE]
    return wrong + [text for name, entry in manifest.files.items() if (text := _wrong_size(folder, name, entry))]


def wrong_in_content(manifest: Manifest, folder: Path, names: Iterable[str]) -> list[str]:
    """What reading shows to be wrong with the files `names`; several at a time, as hashing frees the interpreter."""
    return [text for text in _in_threads(lambda n: _wrong_digest(folder, n, manifest.files[n]), list(names)) if text]


def _writer(name: str, num_ranks: int) -> int:
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match and int(match[1]) < num_ranks else 0


def _wrong_size(folder: Path, name: str, entry: Entry) -> str:
    if name != os.path.basename(name) or name in ("", ".", ".."):
        return f"{NAME} names {name!r}, which is no file of a checkpoint"
    try:
        found = os.stat(folder / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return f"{name} is not a file"
    return "" if found.st_size == entry.bytes else f"{name} has {found.st_size} bytes, and {entry.bytes} were written"


def _wrong_digest(folder: Path, name: str, entry: Entry) -> str:
    try:
        found = entry_of(folder / name)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return "" if found == entry else f"{name} is not as it was written (its SHA-256 differs)"


def _in_threads(work: Any, items: list[str]) -> list[Any]:
    with ThreadPoolExecutor(max_workers=max(1, min(len(items), 8))) as pool:
        return list(pool.map(work, items))
