"""The texts of a run: which files, which of them validate, and the digest that says whether they are the same.

Training and validation share no file and no content: a copy of a file counts once. `packing` writes them down in
`data/`, which is what a run reads from then on; the folder that they came from is not looked at again.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nsa_dist.train.files.marker import holds_run
from nsa_dist.train.refused import Refused
from nsa_dist.train.sections.data import DataSection

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
    files, seen = [], set()
    for name in candidates(data, but_not):
        content = _read(_folder_of(data) / name)
        digest = hashlib.sha256(content).digest()
        if b"\0" not in content and digest not in seen:
            seen.add(digest)
            files.append(TextFile(name, content))
    _check_number(data, len(files))
    return files


def candidates(data: DataSection, but_not: Path | None = None) -> dict[str, int]:
    """{name below the folder: bytes} of what may be a text file, sorted, by its size alone: nothing is read.

    Left out are empty files, those above `max_file_bytes`, and the files of runs: below `but_not`, or beside a marker.
    """
    folder = _folder_of(data)
    names = _standard_library(folder) if data.folder is None else _folder(folder, data.pattern)
    own = but_not and but_not.resolve()
    if own in (folder.resolve(), *folder.resolve().parents):
        own = None  # texts that somebody keeps in the folder of the run; `prepare` sees that they are not its files
    found: dict[str, int] = {}
    with _readable(folder):
        for name in sorted(names):
            if own and own in (folder / name).resolve().parents:
                continue  # a run's own files are not its texts
            if 0 < (size := (folder / name).stat().st_size) <= data.max_file_bytes:
                found[name] = size
    runs = {place for place in {Path(name).parent for name in found} if _is_of_a_run(folder, place)}
    return {name: size for name, size in found.items() if Path(name).parent not in runs}


def check_texts(data: DataSection, sequence_length: int, but_not: Path | None = None) -> None:
    """Refused if the sizes alone say that there are too few texts, or too short ones for a single sequence."""
    sizes = candidates(data, but_not)
    _check_number(data, len(sizes))
    check_length(sum(sizes.values()) + len(sizes), sequence_length)


def check_length(num_tokens: int, sequence_length: int) -> None:
    """Refused if the texts are shorter than one sequence, which would repeat them within itself."""
    if num_tokens < sequence_length:
        raise Refused(
            f"sequence_length={sequence_length} is more than the {num_tokens} tokens of the training texts, so that a "
            f"sequence would hold them more than once; take sequence_length={num_tokens} or less, or more texts"
        )


def _folder_of(data: DataSection) -> Path:
    return data.folder or Path(sysconfig.get_paths()["stdlib"])


def _check_number(data: DataSection, number: int) -> None:
    if number < 2:
        raise Refused(
            f"folder={_folder_of(data)} holds {number} different text files that match pattern={data.pattern!r} and "
            f"have at most max_file_bytes={data.max_file_bytes}, but training and validation need one each at least; "
            f"name another folder or pattern"
        )


def _read(path: Path) -> bytes:
    with _readable(path):
        return path.read_bytes()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(
            f"{str(error.filename or path)!r} cannot be read ({error.strerror}), and data.folder has it among the "
            f"texts; make it readable, or name another folder or pattern"
        ) from None


def _is_of_a_run(folder: Path, place: Path) -> bool:
    """Whether `place` below `folder` is the folder of a run or lies in one, `folder` itself not counted."""
    return any(holds_run(folder / parent) for parent in (place, *place.parents) if parent != Path("."))


def split_files(files: list[TextFile], validation_fraction: float) -> dict[str, list[TextFile]]:
    """Disjoint training and validation files; which is which depends on the names alone, not on their order."""
    shuffled = sorted(files, key=lambda file: hashlib.sha256(_raw(file.name)).digest())
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
            for part in (split.encode(), _raw(file.name), file.content):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _raw(name: str) -> bytes:
    """A file's name as its bytes, UTF-8 or not."""
    return name.encode("utf-8", "surrogateescape")


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
        digest, files = str(written["digest"]), dict(written["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"{listing} does not list the corpus of the run ({type(error).__name__}); {remedy}") from None
    try:
        found = {name: file_digest(folder / name) for name in PACKED_FILES}
    except OSError as error:
        raise Refused(f"{folder} does not hold the whole corpus of the run ({error}); {remedy}") from None
    if expected and digest != expected:
        raise Refused(
            f"{listing} is of a corpus with digest {digest[:16]}, and the run was begun with {expected[:16]}, so other "
            f"samples would follow; {remedy}"
        )
    spoiled = [name for name in PACKED_FILES if files.get(name) != found[name]]
    if spoiled:
        raise Refused(
            f"{', '.join(spoiled)} in {folder} are not as they were written, so other samples would follow; {remedy}"
        )
    return True


def _standard_library(folder: Path) -> Iterator[str]:
    """Packages installed beside it are many times as many files, and are not even listed."""
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if name not in _NOT_PROSE]
        yield from ((Path(place) / name).relative_to(folder).as_posix() for name in names if name.endswith(".py"))


def _folder(folder: Path, pattern: str) -> Iterator[str]:
    for path in folder.rglob(pattern):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()
