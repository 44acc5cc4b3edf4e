"""The files of a tokenizer of bytes, for programs that read tokenizers from files."""

import json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def byte_tokenizer_files() -> dict[str, str]:
    """`tokenizer.json` and `tokenizer_config.json` of a tokenizer of bytes, for programs that read such.

    Token i is byte i. The byte 0, which ends a document, has the name "\\0"; all others go by the characters that the
    `tokenizers` package shows bytes as.
    """
    names = _shown_bytes()
    names[0] = "\0"
    model = {"type": "BPE", "vocab": {name: byte for byte, name in enumerate(names)}, "merges": []}
    end = {"id": 0, "content": "\0", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    whole = {"version": "1.0", "added_tokens": [end | flags], "pre_tokenizer": level, "decoder": level, "model": model}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "\0", "pad_token": "\0", "padding_side": "left",
        "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    return {TOKENIZER: json.dumps(whole) + "\n", TOKENIZER_CONFIG: json.dumps(config, indent=2) + "\n"}


def _shown_bytes() -> list[str]:
    """The character of each byte: printable ones of Latin-1 themselves, the others in a row from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
