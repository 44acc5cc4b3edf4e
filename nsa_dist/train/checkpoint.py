"""Saving and restoring a run through Megatron's distributed checkpoints.

A checkpoint holds model, optimizer, schedule, random states and the number of finished steps, from which the position
in the data follows. It counts only once `latest.json` names it, which happens after every process has written its part.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from nsa_dist.train.model import Trainable
from nsa_dist.train.output import OutputDir
from nsa_dist.train.world import World

_STATE_OF_GROUP = ("params", "step")  # of an optimizer's group: which weights, and how often they were moved
_KIND_OF_GROUP = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # what tells one from another


def save(model: Trainable, output: OutputDir, step: int, keep: int, world: World) -> Path:
    """Write the checkpoint after `step` steps, make it the latest, and drop all but the newest `keep`."""
    path = output.checkpoint(step)
    if world.is_main:
        shutil.rmtree(path, ignore_errors=True)  # what an interrupted attempt left
        path.mkdir(parents=True)
    world.barrier()
    dist_checkpointing.save(_state(model, step, is_loading=False), str(path))
    world.barrier()
    if world.is_main:
        output.set_latest(step)
        output.drop_old_checkpoints(keep)
    world.barrier()
    return path


def restore(model: Trainable, path: Path) -> int:
    """Load the checkpoint at `path`, which may come from another parallel layout; returns its number of steps.

    What the configuration says of rates and schedule holds, whatever the run that saved it had: it may be longer.
    """
    state = _state(model, 0, is_loading=True)
    saved_layout = dist_checkpointing.load_common_state_dict(str(path))["random_layout"]
    if saved_layout != _random_layout():
        # Other tensor or pipeline ranks than these drew the saved numbers. Nothing but dropout would draw more.
        del state["random"]
    loaded = dist_checkpointing.load(state, str(path))
    model.bare_model.load_state_dict(loaded["model"])
    _load_optimizer(model, loaded["optimizer"])
    model.scheduler.load_state_dict(loaded["scheduler"])
    if "random" in state:
        _set_random_states(loaded["random"])
    return loaded["step"]


def _load_optimizer(model: Trainable, state: dict[str, Any]) -> None:
    """Moments and step counts of the checkpoint; rates, decay, betas and eps stay those of the configuration.

    Megatron-core finds a saved group by its values, from 0.17 on by its rates too, so a saved group is given those of
    the current group of its kind first. What torch's optimizer takes over from it is then set back.
    """
    configured = {_kind(group): _settings(group) for group in model.optimizer.param_groups}
    for saved in state.get("optimizer", state)["param_groups"]:
        saved.update(configured[_kind(saved)])
    model.optimizer.load_state_dict(state)
    for group in model.optimizer.param_groups:
        group.update(configured[_kind(group)])


def _kind(group: dict[str, Any]) -> tuple:
    return tuple(group[name] for name in _KIND_OF_GROUP)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _STATE_OF_GROUP}


def _state(model: Trainable, step: int, is_loading: bool) -> dict[str, Any]:
    weights = model.bare_model.sharded_state_dict(metadata=_metadata())
    return {
        "model": weights,
        "optimizer": model.optimizer.sharded_state_dict({"model": weights}, is_loading=is_loading),
        "scheduler": model.scheduler.state_dict(),
        "random": _random_states(),
        "random_layout": _random_layout(),
        "step": step,
    }


def _metadata() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _random_layout() -> list[int]:
    return [
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    ]


def _random_states() -> ShardedObject:
    """One state for each pipeline and tensor rank; replicas and context-parallel ranks share theirs."""
    states = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    offset = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("random", states, tuple(_random_layout()), offset, replica_id=replica)


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
