"""One part of a token set: written by one process, whole or not there, and not written again after a kill."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nsa_dist.train.files.atomic import sync, write_atomically
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens.sources import Piece, Source, documents
from nsa_dist.train.tokens.tokenizers import Unfit, opened

_VERSION = 1  # of what a part is; another one makes parts anew

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


@dataclass(frozen=True)
class Task:
    """A part to be written: `folder/00003.bin`, `.idx` and, last, `.json`."""

    folder: Path
    number: int
    pieces: tuple[Piece, ...]
    tokenizer: str
    end_of_document: str | None
    about: str  # of the tokenizer, as JSON
    json_key: str | None

    @property
    def prefix(self) -> Path:
        return self.folder / f"{self.number:06d}"

    def file(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}")

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def key(self) -> str:
        """Of all that its tokens depend on."""
        files = [
            [str(p.source.path.absolute()), p.source.name, p.source.size, p.source.changed_ns, p.start, p.end]
            for p in self.pieces
        ]
        return hashlib.sha256(json.dumps([_VERSION, self.about, self.json_key, files]).encode()).hexdigest()

    def done(self) -> "Part | None":
        """What an earlier call made of the same task; None if it did not, or not to the end."""
        try:
            raw = json.loads(self.file("json").read_text(encoding="utf-8"))
            part = Part(**raw["part"])
            sizes = {kind: self.file(kind).stat().st_size for kind in ("bin", "idx")}
            return part if raw["key"] == self.key and raw["sizes"] == sizes else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass
class Part:
    """What came of a task. `sources` is a SHA-256 of names and contents; `left_out` says which texts, and why."""

    number: int
    size: int
    documents: int = 0
    tokens: int = 0
    sources: str = ""
    left_out: list[str] = field(default_factory=list)


def write(task: Task) -> Part:
    """The part, on the disk before it counts. Refused where a file that was given by name is no text."""
    tokenizer = opened(task.tokenizer, task.end_of_document)
    draft = task.folder / f"{task.number:06d}-{os.getpid()}"
    builder = begin_file(Path(f"{draft}.bin"), tokenizer.vocab_size)
    part, digest = Part(task.number, task.size), hashlib.sha256()
    for source, found in _texts(task):
        try:
            text = _checked(found)
            tokens = tokenizer.encode(text)
        except Unfit as reason:
            if source.is_named and task.json_key is None:
                raise Refused(f"{source.path} is no document: {reason}; leave it out, or mend it") from None
            part.left_out.append(f"{source.name}: {reason}")
            continue
        for piece in (source.name.encode("utf-8", "surrogateescape"), text):
            digest.update(len(piece).to_bytes(8, "little") + piece)
        builder.add_document(np.append(tokens, tokenizer.end_of_document), lengths=[len(tokens) + 1])
        part.documents += 1
        part.tokens += len(tokens) + 1
    builder.finalize(f"{draft}.idx")
    part.sources = digest.hexdigest()
    _keep(task, draft, part)
    return part


def begin_file(path: Path, vocab_size: int) -> "IndexedDatasetBuilder":
    """Megatron's writer of a .bin file, its numbers as wide as a vocabulary needs."""
    with warnings.catch_warnings():  # of what Megatron-core misses for training; and what is refused needs no torch
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    return IndexedDatasetBuilder(str(path), dtype=DType.optimal_dtype(vocab_size))


def _texts(task: Task) -> Iterator[tuple[Source, bytes | Unfit]]:
    for piece in task.pieces:
        for text in documents(piece, task.json_key):
            yield piece.source, text


def _checked(text: bytes | Unfit) -> bytes:
    if isinstance(text, Unfit):
        raise text
    if not text:
        raise Unfit("it is empty")
    return text


def _keep(task: Task, draft: Path, part: Part) -> None:
    """Another process may do the same part, of a call that was killed: it writes the same bytes."""
    sizes = {}
    for kind in ("bin", "idx"):
        made = Path(f"{draft}.{kind}")
        sync(made)
        sizes[kind] = made.stat().st_size
        os.replace(made, task.file(kind))
    listing = {"key": task.key, "sizes": sizes, "part": asdict(part)}
    made = Path(f"{draft}.json")
    write_atomically(made, json.dumps(listing) + "\n")
    os.replace(made, task.file("json"))
