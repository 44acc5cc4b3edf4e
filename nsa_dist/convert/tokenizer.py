"""The files of a tokenizer that go with a model into its folder."""

import json
from pathlib import Path

from nsa_dist.inference.text import TOKENIZER, TOKENIZER_CONFIG

_BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json")


def files_of(folder: Path, end_of_document: str | None) -> dict[str, bytes]:
    """Name and content of what belongs to the tokenizer in `folder`.

    end_of_document     the token that is said to end a text where the folder itself does not say it; None: nothing is
    """
    beside = {name: (folder / name).read_bytes() for name in _BESIDE if (folder / name).is_file()}
    if end_of_document is not None and TOKENIZER_CONFIG not in beside:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_document}
        beside[TOKENIZER_CONFIG] = (json.dumps(config) + "\n").encode()
    return {TOKENIZER: (folder / TOKENIZER).read_bytes(), **beside}
