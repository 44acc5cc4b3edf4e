"""What the ranks of tests/train/test_resharding.py do: checkpoints of every layout, gone on from in every other."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

from nsa_dist.train import checkpoint, loop
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.files.candidates import name_of
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.model import Trainable, build
from nsa_dist.train.world import entered
from train_cases import StopAfter, copied, run, small_config

WORLD, FORK_STEP, SAVE_STEP, STEPS = 4, 1, 3, 5
# Six ways to share the work of four processes.
LAYOUTS: dict[str, dict] = {
    "DP4": {"run": {"micro_batch_size": 1}},
    "CP4": {"parallel": {"context_parallel_size": 4}},
    "DP2, CP2 contiguous": {"parallel": {"context_parallel_size": 2, "layout": "contiguous"}},
    "TP2, CP2, sequence parallelism": {
        "parallel": {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True}
    },
    "PP2, CP2": {"parallel": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}},
    "TP2, PP2": {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}},
}
PAIRS = [(source, target) for source in LAYOUTS for target in LAYOUTS]


def config_of(base: Path, folder: str, layout: str, **run_keys) -> TrainConfig:
    sections = LAYOUTS.get(layout, {})
    keys = {"steps": STEPS, "checkpoint_interval": 100, **sections.get("run", {}), **run_keys}
    return small_config(base, folder, parallel=sections.get("parallel", {}), run=keys)


def alone(rank: int, base: Path, dtype: str) -> None:
    """One process: a run that stops at FORK_STEP, and a copy of it that goes on to the end."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        run(config_of(base, "fork", "alone", dtype=dtype), StopAfter(FORK_STEP))
        shutil.copytree(base / "fork", base / "alone")
        run(config_of(base, "alone", "alone", dtype=dtype).resuming())


def every_layout_saves(rank: int, base: Path, dtype: str) -> None:
    """A run of each layout goes on from the fork and ends at SAVE_STEP."""
    for source in LAYOUTS:
        copied(rank, base / "fork", base / source)
        run(config_of(base, source, source, dtype=dtype).resuming(), StopAfter(SAVE_STEP - FORK_STEP))


def every_layout_goes_on_in_every_other(rank: int, base: Path) -> None:
    """Copies of what `every_layout_saves` left; and one that goes on without its first moments."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        for source, target in PAIRS:
            _goes_on(rank, base, source, target, f"{source} to {target}")
        with patch.object(checkpoint, "_load_optimizer", partial(_forgets, checkpoint._load_optimizer)):
            _goes_on(rank, base, "CP4", "DP4", "without moments")


def _goes_on(rank: int, base: Path, source: str, target: str, folder: str) -> None:
    copied(rank, base / source, base / folder)
    run(config_of(base, folder, target).resuming())


def _forgets(load: Callable, model: Trainable, state: dict) -> None:
    load(model, state)
    for part in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
        for moments in part.optimizer.state.values():
            moments["exp_avg"].zero_()


def passed_on(rank: int, base: Path) -> None:
    """What each layout saved, read by every other and saved again."""
    for source, target in PAIRS:
        config = config_of(base, f"{source} by {target}", target, dtype="bf16")
        output = OutputDir(config.run.output_dir)
        if rank == 0:
            shutil.copytree(base / source, output.root, ignore=shutil.ignore_patterns("step_*"))
        dist.barrier()
        with entered(config, torch.device("cpu")) as world:
            model = build(config, world)
            position = checkpoint.restore(model, base / source / name_of(SAVE_STEP))
            checkpoint.save(model, output, position, 1, world)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    listed = FileSystemReader(path).read_metadata().state_dict_metadata
    found = {
        key: torch.empty(about.size, dtype=about.properties.dtype)
        for key, about in listed.items()
        if isinstance(about, TensorStorageMetadata)
    }
    load(found, checkpoint_id=path, no_dist=True)
    return found
