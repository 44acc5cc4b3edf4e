"""A folder of text files as two byte-level token files in Megatron's format, for training and for validation.

A token is a byte, so the vocabulary is 256. A zero byte, which text does not contain, ends every document; a document
is a file. Training and validation share no file and no content: a copy of a file counts once.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from nsa_dist.train.config import VOCAB_SIZE, DataSection
from nsa_dist.train.output import write_atomically

END_OF_DOCUMENT = 0
SPLITS = ("train", "validation")

# Of the standard library: installed packages, tests (half of all bytes), and tables of characters.
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


@dataclass(frozen=True)
class TextFile:
    """A file's name below its folder, and its bytes."""

    name: str
    content: bytes


def find_files(data: DataSection) -> list[TextFile]:
    """The text files of a corpus, by name. ValueError if there are fewer than two."""
    folder = data.folder or Path(sysconfig.get_paths()["stdlib"])
    names = _standard_library(folder) if data.folder is None else _folder(folder, data.pattern)
    files, seen = [], set()
    for name in sorted(names):
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


def write_corpus(data: DataSection, folder: Path) -> None:
    """Write `train` and `validation` (.bin, .idx) and `corpus.json`, which lists the files of each, into `folder`.

    `corpus.json` comes last: where it exists the corpus is complete and stays as it is.
    """
    if (folder / "corpus.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    splits = split_files(find_files(data), data.validation_fraction)
    listing = {}
    for split, files in splits.items():
        _write_split(files, folder / split)
        listing[split] = {"bytes": sum(len(f.content) for f in files), "files": [f.name for f in files]}
    write_atomically(folder / "corpus.json", json.dumps(listing, indent=1) + "\n")


def _write_split(files: list[TextFile], prefix: Path) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCAB_SIZE))
    for file in files:
        tokens = np.frombuffer(file.content + bytes([END_OF_DOCUMENT]), dtype=np.uint8)
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), lengths=[len(tokens)])
    builder.finalize(f"{prefix}.idx")


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
