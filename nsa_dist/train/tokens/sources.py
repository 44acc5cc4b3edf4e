"""The texts of a token set: which files, looked at before they are read, and the pieces that they are worked off in."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from nsa_dist.train.data.corpus import candidates
from nsa_dist.train.refused import Refused
from nsa_dist.train.sections.data import DataSection
from nsa_dist.train.tokens.tokenizers import Unfit

_ANY_SIZE = 2**63 - 1


@dataclass(frozen=True)
class Source:
    """A file as it was found. `name` is below its folder, or the file's own; `is_named`: given as a file."""

    path: Path
    name: str
    size: int
    changed_ns: int
    is_named: bool


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a file: all of a text; of JSON lines those that begin there."""

    source: Source
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Found:
    """`left_out` are names of files that are too large."""

    sources: tuple[Source, ...]
    left_out: tuple[str, ...]


def find(places: Sequence[Path], pattern: str, max_file_bytes: int) -> Found:
    """The files of `places`, in their order, those of a folder by name. Nothing is read. Refused."""
    found: list[Source] = []
    for place in places:
        found += _of_folder(place, pattern) if place.is_dir() else [_of_file(place)]
    seen: set[Path] = set()
    for source in found:
        if (real := source.path.resolve()) in seen:
            raise Refused(f"{source.path} is given twice, and its documents would be there twice; name it once")
        seen.add(real)
    large = [source for source in found if source.size > max_file_bytes]
    for source in large:
        if source.is_named:
            raise Refused(
                f"{source.path} has {source.size} bytes, and a file is read whole, up to --max-file-bytes "
                f"{max_file_bytes}; cut it, or give --max-file-bytes {source.size}"
            )
    kept = tuple(source for source in found if source.size <= max_file_bytes)
    if not kept:
        raise Refused(
            f"{', '.join(map(str, places))}: no file that is not empty, matches --pattern {pattern!r} and has at most "
            f"--max-file-bytes {max_file_bytes}; name others"
        )
    return Found(kept, tuple(source.name for source in large))


def pieces_of(source: Source, is_lines: bool, part_bytes: int) -> Iterator[Piece]:
    """One, or for JSON lines as many as keep to `part_bytes`."""
    step = part_bytes if is_lines else source.size
    for start in range(0, source.size, step):
        yield Piece(source, start, min(start + step, source.size))


def parts_of(pieces: Sequence[Piece], part_bytes: int) -> list[tuple[Piece, ...]]:
    """Consecutive pieces of about `part_bytes` together, whatever the number of processes."""
    parts: list[tuple[Piece, ...]] = []
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        if held and size + piece.size > part_bytes:
            parts.append(tuple(held))
            held, size = [], 0
        held.append(piece)
        size += piece.size
    return [*parts, tuple(held)] if held else parts


def documents(piece: Piece, json_key: str | None) -> Iterator[bytes | Unfit]:
    """The texts of a piece as UTF-8, or why one is none. Refused for what was found otherwise, or cannot be read."""
    try:
        now = piece.source.path.stat()
        if (now.st_size, now.st_mtime_ns) != (piece.source.size, piece.source.changed_ns):
            raise Refused(
                f"{piece.source.path} has changed since it was looked at, so it is still being written; give the "
                f"command again when it is whole"
            )
        if json_key is None:
            yield piece.source.path.read_bytes()
        else:
            yield from _lines(piece, json_key)
    except OSError as error:
        raise Refused(
            f"{piece.source.path} cannot be read ({error.strerror}); make it readable, or name other files or another "
            f"--pattern"
        ) from None


def _lines(piece: Piece, key: str) -> Iterator[bytes | Unfit]:
    with piece.source.path.open("rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the line before ends here, or belongs to the piece before
        while (place := file.tell()) < piece.end:
            if (line := file.readline()).strip():
                yield _text_of(line, key, piece.source.path, place)


def _text_of(line: bytes, key: str, path: Path, place: int) -> bytes | Unfit:
    try:
        text = json.loads(line)[key]
        if not isinstance(text, str):
            raise TypeError(f"{key} is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(
            f"{path}: the line at byte {place} is no JSON object with a text {key!r} ({type(error).__name__}: "
            f"{str(error)[:80]}); mend it, or name its key with --json-key"
        ) from None
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Unfit(f"the line at byte {place} is not UTF-8 ({error.reason})")


def _of_folder(folder: Path, pattern: str) -> list[Source]:
    try:
        data = DataSection(folder=folder, pattern=pattern, max_file_bytes=_ANY_SIZE)
    except ValidationError as error:
        words = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise Refused(f"{str(folder)!r}, --pattern {pattern!r}: {words}") from None
    return [replace(_of_file(folder / name), name=name, is_named=False) for name in candidates(data)]


def _of_file(path: Path) -> Source:
    try:
        about = path.stat()
        if not path.is_file():
            raise Refused(f"{path} is neither a file nor a folder; name texts")
    except OSError as error:
        raise Refused(f"{str(path)!r} cannot be read ({error.strerror}); name files or folders of texts") from None
    if not about.st_size:
        raise Refused(f"{path} is empty, and a document is not; leave it out")
    return Source(path, path.name, about.st_size, about.st_mtime_ns, is_named=True)
