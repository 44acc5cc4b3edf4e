"""Small models that learn to copy: importable, because spawned processes find their work by name."""

from pathlib import Path
from unittest.mock import patch

import numpy as np

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.tasks.drawing import Drawn
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
        optimizer={"lr": 4e-3, "min_lr": 1e-4, "warmup_steps": 20},
        **sections,
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
