"""Texts to tokens and back: bytes, or the tokenizer of a folder; and the files that go with an exported model."""

from nsa_dist.inference.text.files import TOKENIZER, TOKENIZER_CONFIG, byte_tokenizer_files
from nsa_dist.inference.text.tokenizers import ByteText, FolderText, Stream, Tokenizer, tokenizer_of

__all__ = [
    "TOKENIZER",
    "TOKENIZER_CONFIG",
    "ByteText",
    "FolderText",
    "Stream",
    "Tokenizer",
    "byte_tokenizer_files",
    "tokenizer_of",
]
