"""The texts of a run: which files, which of them validate, and the digest that says whether they are the same.

Training and validation share no file and no content: a copy of a file counts once. `packing` writes them down in
`data/`, which is what a run reads from then on; the folder that they came from is not looked at again.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nsa_dist.train.config import DataSection

SPLITS = ("train", "validation")
PACKED_FILES = tuple(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))
_CHUNK_BYTES = 2**22

# Of the standard library: installed packages, tests (half of all bytes), and tables of characters.
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


@dataclass(frozen=True)
class TextFile:
    """A file's name below its folder, and its bytes."""

    name: str
    content: bytes


def find_files(data: DataSection, but_not: Path | None = None) -> list[TextFile]:
    """The text files of a corpus, by name, without those below `but_not`. ValueError if there are fewer than two."""
    folder = data.folder or Path(sysconfig.get_paths()["stdlib"])
    names = _standard_library(folder) if data.folder is None else _folder(folder, data.pattern)
    own = but_not and but_not.resolve()
    files, seen = [], set()
    for name in sorted(names):
        if own and own in (folder / name).resolve().parents:
            continue  # a run's own files are not its texts
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).digest()
        is_text = bool(content) and b"\0" not in content and len(content) <= data.max_file_bytes
        if is_text and digest not in seen:
            seen.add(digest)
            files.append(TextFile(name, content))
    if len(files) < 2:
        raise ValueError(
            f"folder={folder} holds {len(files)} different text files that match pattern={data.pattern!r}, but "
            f"training and validation need one each at least; name another folder or pattern"
        )
    return files


def split_files(files: list[TextFile], validation_fraction: float) -> dict[str, list[TextFile]]:
    """Disjoint training and validation files; which is which depends on the names alone, not on their order."""
    shuffled = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    num_validation = min(max(1, round(validation_fraction * len(files))), len(files) - 1)
    return {"validation": shuffled[:num_validation], "train": shuffled[num_validation:]}


def splits_of(data: DataSection, but_not: Path | None = None) -> dict[str, list[TextFile]]:
    """The files of each split as `data` says."""
    return split_files(find_files(data, but_not), data.validation_fraction)


def digest_of(splits: Mapping[str, Sequence[TextFile]]) -> str:
    """Of names, bytes and order; equal where the same corpus would be packed."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for file in splits[split]:
            for part in (split.encode(), file.name.encode(), file.content):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_packed(folder: Path, expected: str) -> bool:
    """Whether `folder` holds the packed corpus of digest `expected` ("": of any), every byte read.

    False where there is none. ValueError where there is another, or where a file of it is not as it was written.
    """
    listing = folder / "corpus.json"
    if not listing.exists():
        return False
    remedy = "put the files back, or remove that folder: it is packed again if data.folder still has the same texts"
    try:
        written = json.loads(listing.read_text(encoding="utf-8"))
        digest, files = written["digest"], written["sha256"]
        found = {name: file_digest(folder / name) for name in PACKED_FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} does not hold the whole corpus of the run ({error}); {remedy}") from None
    if expected and digest != expected:
        raise ValueError(
            f"{listing} is of a corpus with digest {digest[:16]}, and the run was begun with {expected[:16]}, so other "
            f"samples would follow; {remedy}"
        )
    spoiled = [name for name in PACKED_FILES if files.get(name) != found[name]]
    if spoiled:
        raise ValueError(
            f"{', '.join(spoiled)} in {folder} are not as they were written, so other samples would follow; {remedy}"
        )
    return True


def _standard_library(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        if _NOT_PROSE.isdisjoint(name.parts):
            yield name.as_posix()


def _folder(folder: Path, pattern: str) -> Iterator[str]:
    for path in folder.rglob(pattern):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()
