"""Runs on packed documents: importable, because spawned processes find their work by name."""

import random
import shutil
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from learning_cases import copying
from nsa_dist import NSAConfig
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.train import loop
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.packs import Packer
from nsa_dist.train.model import build
from nsa_dist.train.world import entered
from train_cases import StopAfter, copied, run, small_config

STEPS, FORK_STEP = 22, 2
ORDERS: dict[str, dict] = {
    "the row in a zigzag": {"layout": "zigzag"},
    "each document in a zigzag": {"layout": "zigzag", "pack_order": "documents"},
    "the row in chunks": {"layout": "contiguous"},
}
# Over two ranks, and over four.
PAIRS: dict[str, dict] = {
    **{f"CP2, {order}": {"context_parallel_size": 2, **parallel} for order, parallel in ORDERS.items()},
    "DP2": {},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
FOURS: dict[str, dict] = {
    **{f"CP4, {order}": {"context_parallel_size": 4, **parallel} for order, parallel in ORDERS.items()},
    "CP2 PP2": {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "CP2 TP2": {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "pack_order": "documents"},
}


def write_documents(folder: Path, num_files: int = 60, seed: int = 0) -> None:
    """Of 1 to 400 bytes, which no block length divides."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for i in range(num_files):
        text = "".join(f"{i} and {j} are {i + j}\n" for j in range(30))
        (folder / f"{i:02}.txt").write_text(text[: draw.choice([1, 5, 40, 150, 400])])


def config(base: Path, name: str, parallel: dict | None = None, steps: int = STEPS, **sections: dict) -> TrainConfig:
    lengths = {"steps": steps, "checkpoint_interval": steps, "eval_interval": steps, "health_interval": steps}
    # At 1e-8 Adam moves weights whose gradients are rounding as fast as others (docs/decisions/tiny-job.md).
    sections["optimizer"] = {"adam_eps": 2e-5, **sections.get("optimizer", {})}
    sections["data"] = {"documents": "packed", **sections.get("data", {})}
    return small_config(base, name, parallel=parallel or {}, run=lengths, **sections)


def keep_selection(blocks: Tensor, sizes: NSAConfig, where: str, path: Path) -> None:
    """In place of the picture, what it would show."""
    torch.save(blocks, path.with_suffix(".pt"))


def alone(rank: int, base: Path, steps: int = STEPS) -> None:
    run(config(base, "fork", steps=steps), StopAfter(FORK_STEP))
    shutil.copytree(base / "fork", base / "one")
    with patch.object(loop, "plot_selection", keep_selection):
        run(config(base, "one", steps=steps).resuming())


def over_ranks(rank: int, base: Path, layouts: dict[str, dict], steps: int = STEPS) -> None:
    """The fork to the end in every layout; the last of them runs its attention again in backward."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection", keep_selection):
        for name, parallel in layouts.items():
            copied(rank, base / "fork", base / name)
            model = {"recompute_attention": name == list(layouts)[-1]}
            run(config(base, name, parallel, steps, model=model).resuming())


# --- who sees whom ----------------------------------------------------------------------------------------------------

BOUNDS = (0, 1, 33, 150, 256)


def seen(rank: int, base: Path, attention: str) -> dict[str, Tensor]:
    """Logits [256, 256] of a row of four documents; with the third rewritten; each alone; and joined, both ways."""
    made = config(base, "seen", model={"attention": attention})
    row = torch.randint(1, 255, (256,), generator=torch.Generator().manual_seed(1))
    other = row.clone()
    other[33:150] = 255 - row[33:150]
    with entered(made, torch.device("cpu")) as world:
        model = build(made, world)
        model.module.eval()
        packer = Packer(model.config, world)

        def logits(tokens: Tensor, bounds: tuple[int, ...]) -> Tensor:
            with torch.no_grad():
                return model.module(tokens[None], None, None, packed_seq_params=packer.of(bounds).params)[0]

        return {
            "row": logits(row, BOUNDS),
            "rewritten": logits(other, BOUNDS),
            "alone": torch.cat([logits(row[a:b], (0, b - a)) for a, b in pairwise(BOUNDS)]),
            "joined": logits(row, (0, 256)),
            "joined and rewritten": logits(other, (0, 256)),
        }


def answer_tasks(rank: int, base: Path) -> None:
    """Rows of one text each, as packs of two and as they are, over two ranks."""
    tasks = {"tasks": {"copy": 1.0}, "task_lengths": [256]}
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        for documents in ("packed", "whole"):
            parallel = {"context_parallel_size": 2}
            run(config(base, f"tasks {documents}", parallel, 3, data={**tasks, "documents": documents}))


# --- learning ---------------------------------------------------------------------------------------------------------

LETTERS, LEARNING_STEPS = 61, 200


def write_copies(folder: Path, scrambled: bool = False, number: int = 2400) -> None:
    """Documents of 61 letters, a bar, and the same letters: 124 bytes with their end, in blocks of 8."""
    folder.mkdir(parents=True)
    draw = random.Random(5)
    for i in range(number):
        letters = draw.choices("abcdefghijklmnopqrstuvwxyz", k=LETTERS)
        front = draw.sample(letters, LETTERS) if scrambled else letters
        (folder / f"{i}.txt").write_text("".join([*front, "|", *letters]))


def learning(base: Path, name: str, parallel: dict, texts: str = "copies", attention: str = "nsa") -> TrainConfig:
    """With four documents a row: what is to be copied stands 62 bytes back, window 16."""
    return copying(
        base, name, attention, parallel=parallel,
        data={"folder": base / "texts" / texts, "validation_fraction": 0.05, "documents": "packed"},
        run={
            "steps": LEARNING_STEPS, "sequence_length": 512, "global_batch_size": 4, "micro_batch_size": 4,
            "eval_interval": LEARNING_STEPS, "eval_batches": 4, "checkpoint_interval": LEARNING_STEPS,
        },
    )  # fmt: skip


def learn_alone(rank: int, base: Path) -> None:
    run(learning(base, "one", {}))
    run(learning(base, "dense", {}, attention="dense"))
    run(learning(base, "scrambled", {}, texts="scrambled"))


def learn_over_ranks(rank: int, base: Path) -> None:
    """In every order; and cut in another order than the layers were told, which no check can see."""
    for name, parallel in ORDERS.items():
        run(learning(base, name, {"context_parallel_size": 2, **parallel}))

    def zigzag(packer: Packer, bounds: tuple[int, ...]) -> ShardPlan:
        return ShardPlan.zigzag([0, bounds[-1]], 2, bounds[-1] // 4)

    with patch.object(Packer, "_cut", zigzag):
        run(learning(base, "wrong order", {"context_parallel_size": 2, "layout": "contiguous"}))
