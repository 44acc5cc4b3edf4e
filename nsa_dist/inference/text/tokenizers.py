"""Texts to tokens and back, as they come: bytes, or the `tokenizer.json` of a folder (extra `tokens`)."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from nsa_dist.inference.text.files import TOKENIZER

_CONTEXT = 5  # tokens of the prompt that the first new one is decoded with: spaces depend on what is before
_CUT = "\ufffd"  # what decodes to this at the end may be the beginning of a character


class Stream(Protocol):
    """The text of one prompt's new tokens."""

    def add(self, token: int) -> str:
        """The text that is certain now; characters of several tokens come with the last of them."""
        ...

    def rest(self) -> str:
        """What is left when no more tokens come."""
        ...


class Tokenizer(Protocol):
    """Of one model."""

    def encode(self, text: str) -> list[int]: ...

    def stream(self, prompt: Sequence[int]) -> Stream: ...


class ByteText:
    """A token is a byte of UTF-8; what came from a command line undecoded is given back as it was."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def stream(self, prompt: Sequence[int]) -> Stream:
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def rest(self) -> str:
        return self._decoder.decode(b"", True)


class FolderText:
    """`tokenizer.json` of a folder, as `nsa-dist data build --tokenizer` reads it: no text holds special tokens.

    ValueError for a file that is none, and without the package `tokenizers`.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer as Model
        except ModuleNotFoundError as error:
            if error.name != "tokenizers":
                raise
            raise ValueError(
                f"{folder / TOKENIZER} needs the package tokenizers, which is not installed here: bytes need none; pip "
                f"install 'nsa-dist[tokens]', or in a checkout pip install --editable '.[tokens]', brings it"
            ) from None
        try:
            self._model: Any = Model.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(
                f"{folder / TOKENIZER} cannot be read as a tokenizer ({error}); put it back from where it was copied, "
                f"or take a newer `tokenizers`"
            ) from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def stream(self, prompt: Sequence[int]) -> Stream:
        return _FolderStream(self._model, prompt)


class _FolderStream:
    """Decodes the last tokens with those before them, and gives what that has more than those before alone."""

    def __init__(self, model: Any, prompt: Sequence[int]) -> None:
        self._model, self._tokens = model, list(prompt)[-_CONTEXT:]
        self._start, self._said = 0, len(self._tokens)

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._new()
        if not text or text.endswith(_CUT):
            return ""
        self._start, self._said = self._said, len(self._tokens)
        return text

    def rest(self) -> str:
        return self._new()

    def _new(self) -> str:
        before, after = (self._model.decode(self._tokens[self._start : end]) for end in (self._said, None))
        return after[len(before) :]


def tokenizer_of(kind: str, folder: Path | None) -> Tokenizer:
    """That of a model whose config says `tokenizer=kind`; `folder` holds its tokenizer.json, or ValueError."""
    if kind == "bytes":
        return ByteText()
    if folder is None or not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"the model's tokens are those of a tokenizer ({kind}), and there is no {TOKENIZER} in "
            f"{folder or 'the run'}, which has their numbers alone; export the run again with --tokenizer DIR, the "
            f"folder with which its tokens were built"
        )
    return FolderText(folder)
