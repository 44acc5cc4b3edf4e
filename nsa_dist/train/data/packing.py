"""The texts of a run as two byte-level token files in Megatron's format, for training and for validation.

A token is a byte, so the vocabulary is 256. A zero byte, which text does not contain, ends every document; a document
is a file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from nsa_dist.train.config import END_OF_DOCUMENT, VOCAB_SIZE
from nsa_dist.train.data.corpus import PACKED_FILES, TextFile, check_packed, digest_of, file_digest, splits_of
from nsa_dist.train.files.atomic import write_atomically
from nsa_dist.train.refused import Refused
from nsa_dist.train.sections.data import DataSection


def write_corpus(data: DataSection, folder: Path, expected: str = "", but_not: Path | None = None) -> str:
    """Write `train` and `validation` (.bin, .idx) and `corpus.json`, which lists the files of each, into `folder`.

    `corpus.json` comes last: where it exists the corpus is complete and stays as it is. Returns the corpus's digest;
    ValueError where it is not the `expected` one ("": any will do). Files below `but_not` are left out.
    """
    if check_packed(folder, expected):
        return json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["digest"]
    splits = splits_of(data, but_not)
    digest = digest_of(splits)
    if expected and digest != expected:
        raise Refused(
            f"{folder} is empty, and folder={data.folder or 'the standard library'} holds other texts than those that "
            f"the run was begun with (digest {digest[:16]}, then {expected[:16]}), so other samples would follow; put "
            f"the old texts or {folder} back, or start another run in another output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split, files in splits.items():
        _write_split(files, folder / split)
    listing = {
        "digest": digest,
        "sha256": {name: file_digest(folder / name) for name in PACKED_FILES},
        **{
            split: {"bytes": sum(len(f.content) for f in files), "files": [f.name for f in files]}
            for split, files in splits.items()
        },
    }
    write_atomically(folder / "corpus.json", json.dumps(listing, indent=1) + "\n")
    return digest


def _write_split(files: Sequence[TextFile], prefix: Path) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCAB_SIZE))
    for file in files:
        tokens = np.frombuffer(file.content + bytes([END_OF_DOCUMENT]), dtype=np.uint8)
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), lengths=[len(tokens)])
    builder.finalize(f"{prefix}.idx")
