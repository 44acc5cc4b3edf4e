"""`PREFIX.json`: what a token set is. It is written last, so where it is the set is whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsa_dist.train.data.corpus import file_digest
from nsa_dist.train.files.atomic import write_atomically
from nsa_dist.train.refused import Refused

FORMAT, VERSION = "nsa-dist tokens", 1
KINDS = ("bin", "idx")
_REMEDY = "build it again with nsa-dist data build, or put its files back from a copy"


@dataclass(frozen=True)
class TokenSet:
    """`bytes` and `sha256` are {"bin": ..., "idx": ...}; `tokens` counts the ends of documents, too."""

    tokenizer: Mapping[str, Any]
    vocab_size: int
    end_of_document: int
    documents: int
    tokens: int
    sources: Mapping[str, Any]
    left_out: Mapping[str, Any]
    bytes: Mapping[str, int]
    sha256: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all that it says: equal for sets of the same tokens of the same texts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, prefix: Path) -> None:
        raw = {"format": FORMAT, "version": VERSION, **asdict(self), "digest": self.digest}
        write_atomically(file_of(prefix, "json"), json.dumps(raw, indent=1) + "\n")


def file_of(prefix: Path, kind: str) -> Path:
    """PREFIX.bin, PREFIX.idx or PREFIX.json."""
    return prefix.with_name(f"{prefix.name}.{kind}")


def read(prefix: Path) -> TokenSet:
    """The set at `prefix`, its files there with the sizes that they had. Refused; nothing but the JSON is read."""
    path = file_of(prefix, "json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if (raw.pop("format"), raw.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"format {FORMAT!r}, version {VERSION}, was expected")
        digest = raw.pop("digest")
        made = TokenSet(**raw)
        if digest != made.digest:
            raise ValueError("what it says and its own digest differ")
    except FileNotFoundError:
        raise Refused(_without_listing(prefix)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{path} lists no token set ({type(error).__name__}: {error}); {_REMEDY}") from None
    for kind in KINDS:
        file = file_of(prefix, kind)
        try:
            size = file.stat().st_size
        except OSError as error:
            raise Refused(f"{file} cannot be read ({error.strerror}), and {path} lists it; {_REMEDY}") from None
        if size != made.bytes[kind]:
            raise Refused(f"{file} has {size} bytes, and {path} lists {made.bytes[kind]}: it is torn; {_REMEDY}")
    return made


def check_files(prefix: Path, kinds: tuple[str, ...] = KINDS) -> TokenSet:
    """As `read`, every byte of the files of `kinds` compared."""
    made = read(prefix)
    for kind in kinds:
        if file_digest(file_of(prefix, kind)) != made.sha256[kind]:
            raise Refused(f"{file_of(prefix, kind)} is not as it was written (its SHA-256 differs); {_REMEDY}")
    return made


def _without_listing(prefix: Path) -> str:
    if prefix.name.endswith(tuple(f".{kind}" for kind in (*KINDS, "json"))):
        return f"{prefix} names a file, and a token set has three; give {prefix.with_suffix('')}"
    if any(file_of(prefix, kind).exists() for kind in KINDS):
        return (
            f"{prefix} has tokens but no {prefix.name}.json, which says what they are: a build was cut off, or another "
            f"program made them; finish it by giving nsa-dist data build again, or build it from the texts"
        )
    return f"there is no token set {prefix} ({prefix.name}.json); make it with nsa-dist data build"
