"""An exported model: a folder with `config.json`, `model.safetensors`, and its tokenizer's files."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from nsa_dist.inference.model import GPT, GPTConfig
from nsa_dist.inference.tensors import read_tensors, write_tensors
from nsa_dist.inference.text import byte_tokenizer_files

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_model(model: GPT, folder: Path, tokenizer: Mapping[str, bytes] | None = None) -> None:
    """Write the files into `folder`, which is made.

    tokenizer       name and content of its files, tokenizer.json and those beside it; of bytes they are made here
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(model.config.as_json(), indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, model.config.tokenizer, tokenizer)


def write_tokenizer(folder: Path, kind: str, files: Mapping[str, bytes] | None) -> None:
    """Name and content of a tokenizer's files; without any, those of bytes for a model of bytes."""
    if not files and kind == "bytes":
        files = {name: text.encode() for name, text in byte_tokenizer_files().items()}
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> GPT:
    """The model of an exported folder, for evaluation. ValueError for files that are missing, cut or of other sizes."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}, so it is no exported model; write one with nsa-dist export RUN --to {folder}"
            )
    try:
        config = GPTConfig.of_json(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from error
    model, weights = GPT(config, "meta"), read_tensors(folder / WEIGHTS)
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(
            f"{folder / WEIGHTS} does not hold the model of {CONFIG}: {', '.join(wrong[:4])} "
            f"{'and others ' if len(wrong) > 4 else ''}differ; export the run again, both files belong together"
        )
    model.load_state_dict({name: x.to(device, config.torch_dtype) for name, x in weights.items()}, assign=True)
    return model.requires_grad_(False).eval()
