"""Token sets for tests, and runs on them: importable, because spawned processes find work by name."""

from pathlib import Path

import numpy as np

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.tokens import build as building
from nsa_dist.train.tokens import parts
from nsa_dist.train.tokens.listing import TokenSet
from train_cases import StopAfter, run, small_config

WEIGHTS = {"a": 0.7, "b": 0.3}


class Shifted:
    """Bytes and a number: a vocabulary that is neither 256 nor a multiple of 128."""

    end_of_document = 299

    def __init__(self, vocab_size: int = 300) -> None:
        self.vocab_size = vocab_size
        self.about = {"kind": "shifted", "size": vocab_size}

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64) + 40


def shifted_set(monkeypatch, prefix: Path, start: int, num_files: int = 8, vocab_size: int = 300) -> TokenSet:
    folder = prefix.parent / f"{prefix.name}-texts"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + num_files):
        (folder / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}\n" for j in range(60)))
    with monkeypatch.context() as patched:
        for module in (building, parts):
            patched.setattr(module, "opened", lambda *_: Shifted(vocab_size))
        return building.build(building.Request([folder], prefix))


def config_of(base: Path, name: str, data: dict | None = None, **sections: dict) -> TrainConfig:
    blend = [[weight, str(base / "sets" / name)] for name, weight in WEIGHTS.items()]
    return small_config(
        base, name, data={"folder": None, "tokens": blend, "documents": "packed", **(data or {})}, **sections
    )


def token_runs(rank: int, base: Path) -> None:
    """A run over two context parallel ranks; the same stopped, and gone on with over two tensor parallel ones."""
    context = {"parallel": {"context_parallel_size": 2}, "run": {"steps": 4}}
    run(config_of(base, "whole", **context))
    run(config_of(base, "parted", **context), StopAfter(2))
    tensor = {"parallel": {"tensor_model_parallel_size": 2}, "run": {"steps": 4, "resume": True}}
    run(config_of(base, "parted", **tensor))
