"""What turns a text into tokens: its bytes, or a tokenizer of Hugging Face's from a folder."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nsa_dist.train.refused import Refused

BYTES = "bytes"
_MODEL = "tokenizer.json"  # the file of the `tokenizers` package
_NAMES_OF_SPECIALS = ("tokenizer_config.json", "special_tokens_map.json")


class Unfit(Exception):
    """A text that a tokenizer cannot take, with the reason."""


class Tokenizer(Protocol):
    """`about` is in JSON's types, and equal for tokenizers that give the same tokens."""

    @property
    def about(self) -> Mapping[str, Any]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_document(self) -> int: ...

    def encode(self, text: bytes) -> np.ndarray:
        """int64 [tokens] of a text in UTF-8, without the end of the document. Unfit."""
        ...


class ByteTokenizer:
    """A token is a byte; zero, which text does not contain, ends a document."""

    about: Mapping[str, Any] = {"kind": BYTES}
    vocab_size = 256
    end_of_document = 0

    def encode(self, text: bytes) -> np.ndarray:
        if b"\0" in text:
            raise Unfit("it holds zero bytes, so it is no text")
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)


@dataclass(frozen=True)
class FolderTokenizer:
    """`tokenizer.json` of a folder, whole texts at a time: what it says of truncation and padding is turned off.

    Nothing in a text is taken for a special token, so that no text can end its own document.
    """

    folder: Path
    end: str | None = None  # the token that ends a document; None: the folder's eos_token

    @cached_property
    def about(self) -> Mapping[str, Any]:
        digest = hashlib.sha256((self.folder / _MODEL).read_bytes()).hexdigest()
        return {"kind": "huggingface", "sha256": digest, "end_of_document": self._end_name}

    @cached_property
    def vocab_size(self) -> int:
        return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def end_of_document(self) -> int:
        number = self._model.token_to_id(self._end_name)
        if number is None:
            raise Refused(
                f"{self._end_name!r} is no token of {self.folder / _MODEL}, and one must end every document; name one "
                f"that is, such as --end-of-document '<|endoftext|>'"
            )
        return int(number)

    def encode(self, text: bytes) -> np.ndarray:
        try:
            words = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unfit(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
        return np.array(self._model.encode(words, add_special_tokens=False).ids, dtype=np.int64)

    @cached_property
    def _model(self) -> Any:
        try:
            from tokenizers import Tokenizer as Model
        except ModuleNotFoundError as error:
            if error.name != "tokenizers":
                raise
            raise Refused(
                f"--tokenizer {self.folder} needs the package tokenizers, which is not installed here: bytes need "
                f"none; pip install 'nsa-dist[tokens]', or in a checkout pip install --editable '.[tokens]', brings it"
            ) from None
        try:
            model = Model.from_file(str(self.folder / _MODEL))
        except Exception as error:  # the package raises nothing narrower
            raise Refused(
                f"{self.folder / _MODEL} cannot be read as a tokenizer ({error}); put it back from where it was "
                f"downloaded, or take a newer `tokenizers`"
            ) from None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        return model

    @cached_property
    def _end_name(self) -> str:
        if self.end is not None:
            return self.end
        for name in _NAMES_OF_SPECIALS:
            if found := _special(self.folder / name):
                return found
        raise Refused(
            f"{self.folder} names no eos_token ({' or '.join(_NAMES_OF_SPECIALS)}), and a token must end every "
            f"document; name it with --end-of-document"
        )


def opened(name: str, end: str | None) -> Tokenizer:
    """The tokenizer that `--tokenizer` and `--end-of-document` name, tried once. Refused with what to do."""
    if name == BYTES:
        if end is not None:
            raise Refused(
                f"--end-of-document {end}: the end of a document of bytes is the byte 0; leave that option out, or "
                f"give --tokenizer DIR"
            )
        return ByteTokenizer()
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise Refused(
            f"--tokenizer {name} is neither the word bytes nor a folder of this machine, and nothing is downloaded; "
            f"download the tokenizer and name its folder"
        )
    if not (folder / _MODEL).is_file():
        raise Refused(
            f"--tokenizer {name} holds no {_MODEL}, the only kind of file that is read; write one with "
            f"transformers.AutoTokenizer.from_pretrained({name!r}).save_pretrained({name!r})"
        )
    tokenizer = FolderTokenizer(folder, end)
    assert tokenizer.end_of_document < tokenizer.vocab_size
    return tokenizer


def _special(path: Path) -> str | None:
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise Refused(f"{path} cannot be read ({error}); mend it, or name the token with --end-of-document") from None
    return token.get("content") if isinstance(token, dict) else token
