"""Small models that learn to copy and to recall: importable, because spawned processes find their work by name."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.tasks.drawing import LETTERS, Answer, Drawn
from nsa_dist.train.tasks.kinds import TASKS, copy
from train_cases import records, run, small_config

LENGTH, STEPS = 128, 200


def copying(base: Path, name: str, attention: str, **sections: dict) -> TrainConfig:
    """A model that learns to copy: a window of 16 bytes, and blocks of 8 of which a query sees 5."""
    return small_config(
        base, name,
        model={
            "attention": attention, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16,
            "ffn_hidden_size": 128,
        },
        nsa={
            "cmp_block_len": 8, "cmp_stride": 4, "slc_block_len": 8, "num_slc_blocks": 5, "window_len": 16,
            "rotary_base": 500.0,
        },
        **{"optimizer": {"lr": 4e-3, "min_lr": 1e-4, "warmup_steps": 20}, **sections},
    )  # fmt: skip


def config(base: Path, name: str, attention: str) -> TrainConfig:
    """What is to be copied stands 64 bytes back: four windows, of up to 16 blocks."""
    return copying(
        base, name, attention,
        data={"folder": base / "texts", "validation_fraction": 0.25, "tasks": {"copy": 1.0}, "task_lengths": [LENGTH]},
        run={
            "steps": STEPS, "sequence_length": LENGTH, "global_batch_size": 16, "micro_batch_size": 16,
            "eval_interval": STEPS, "eval_batches": 2, "checkpoint_interval": STEPS,
        },
    )  # fmt: skip


def scrambled(rng: np.random.RandomState, length: int) -> Drawn:
    """A copy of letters that stand in another order in front: the answers no longer follow."""
    drawn = copy(rng, length)
    middle = drawn.text.index(b"|")
    front = np.frombuffer(drawn.text[:middle], dtype=np.uint8)
    return Drawn(rng.permutation(front).tobytes() + drawn.text[middle:], drawn.answers)


def learn(rank: int, base: Path) -> dict[str, list[float]]:
    """By run, the shares of right answers before the first step and after the last."""
    for name in ("dense", "nsa"):
        run(config(base, name, name))
    with patch.dict(TASKS, copy=scrambled):
        run(config(base, "scrambled", "dense"))
    names = ("dense", "nsa", "scrambled")
    return {name: [r["tasks"]["copy"]["accuracy"] for r in records(base, name, "tasks")] for name in names}


# --- recall, in every packing and layout ------------------------------------------------------------------------------

MOST_PAIRS, GAP = 12, 16  # the gap is as long as the window
# Bytes of a text, of a row, and rows of a micro-batch, which are cut over ranks as one: no text ends where a part does.
PACKED = 160, 480, 5
WHOLE_LAYOUTS: dict[str, dict] = {
    "one process": {},
    "CP2 zigzag": {"context_parallel_size": 2},
    "CP2 contiguous": {"context_parallel_size": 2, "layout": "contiguous"},
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
}
PACKED_LAYOUTS: dict[str, dict] = {
    **WHOLE_LAYOUTS,
    "CP2, each document in a zigzag": {"context_parallel_size": 2, "pack_order": "documents"},
}


class Seen(NamedTuple):
    """Shares of right answers after the last step."""

    answers: float
    far: float  # whose evidence stands in the first fifth alone: beyond the window


def recall_in_rounds(rng: np.random.RandomState, length: int) -> Drawn:
    """2 to 12 pairs of a letter and a digit, a gap, then rounds: the letters in drawn order, and their digits."""
    return _rounds(rng, length, lambda digits: digits)


def scrambled_recall(rng: np.random.RandomState, length: int) -> Drawn:
    """The same, with the digits of each round in another order: none follows from what is before it."""
    return _rounds(rng, length, lambda digits: list(rng.permutation(digits)))


def _rounds(rng: np.random.RandomState, length: int, digits_of_round: Callable[[list[int]], list[int]]) -> Drawn:
    number = int(2 * (MOST_PAIRS / 2) ** rng.random_sample())
    letters, digits = list(rng.permutation(26)[:number]), list(rng.randint(10, size=number))
    text = bytearray(b"".join(b"%c%d" % pair for pair in zip((LETTERS[i] for i in letters), digits, strict=True)))
    seen, answers = {letter: 2 * i for i, letter in enumerate(letters)}, []
    text += b"." * GAP
    while len(text) + 2 * number <= length:
        asked = list(zip(letters, digits_of_round(digits), strict=True))
        for letter, digit in (asked[i] for i in rng.permutation(number)):
            answers.append(Answer(len(text) + 1, len(text) + 2, seen[letter] / length))
            seen[letter] = len(text)
            text += b"%c%d" % (LETTERS[letter], digit)
    return Drawn(bytes(text), tuple(answers))


def learn_recall(rank: int, base: Path, packed: bool, layout: str, scrambled: bool) -> Seen:
    text, row, rows = PACKED if packed else (LENGTH, LENGTH, 16)
    config = copying(
        base, "run", "nsa", parallel=PACKED_LAYOUTS[layout],
        data={
            "folder": base / "texts", "validation_fraction": 0.25, "tasks": {"recall": 1.0}, "task_lengths": [text],
            "documents": "packed" if packed else "whole",
        },
        run={
            "steps": STEPS, "sequence_length": row, "global_batch_size": rows, "micro_batch_size": rows,
            "eval_interval": STEPS, "eval_batches": 4, "checkpoint_interval": STEPS,
        },
        optimizer={"lr": 6e-3, "min_lr": 1e-4, "warmup_steps": 20},
    )  # fmt: skip
    with patch.dict(TASKS, recall=scrambled_recall if scrambled else recall_in_rounds):
        run(config)
    seen = records(base, "run", "tasks")[-1]["tasks"]["recall"]
    return Seen(seen["accuracy"], seen["by_length"][str(text)]["by_depth"][0])
