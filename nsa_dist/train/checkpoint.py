"""Saving and restoring a run through Megatron's distributed checkpoints.

A checkpoint holds model, optimizer, schedule, random states, the number of finished steps, and the number of samples
consumed, which is the position in the data. It counts only once it has its manifest (`files.manifest`), which is
written after every process has written its part. What is loaded was verified before: `files.intact`.
"""

from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from nsa_dist.train.files.manifest import Entry, Manifest, written_by
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.model import Trainable, sharding_metadata
from nsa_dist.train.refused import Refused
from nsa_dist.train.world import World

_STATE_OF_GROUP = ("params", "step")  # of an optimizer's group: which weights, and how often they were moved
_KIND_OF_GROUP = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # what tells one from another


class Position(NamedTuple):
    """How far a run has come."""

    step: int = 0
    samples: int = 0  # consumed by all ranks together


def save(model: Trainable, output: OutputDir, position: Position, keep: int, world: World) -> Path:
    """Write the checkpoint of `position`, make it the latest, and drop all but the newest `keep`.

    Each process takes the digests of what it wrote. ValueError on every process if the checkpoint's folder is there
    and not the run's.
    """
    path = Path(world.agreed(lambda: str(output.make_checkpoint(position.step))))
    _report_in_process()
    dist_checkpointing.save(_state(model, position, is_loading=False), str(path))
    parts = world.gathered(written_by(world.rank, world.size, path))  # by then the slowest has written
    if world.is_main:
        files = {name: Entry(*entry) for part in parts for name, entry in sorted(part.items())}
        output.complete(Manifest(output.marker().run_id, position.step, position.samples, files))
        output.drop_old_checkpoints(keep)
    world.barrier()
    return path


def _report_in_process() -> None:
    """What Megatron's writers report comes through this process, which waits for them.

    Megatron would start one for it, as for saves in the background. That one outlives a trainer that is killed, and
    holds its output open: whoever reads that waits for ever.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = Queue()


def restore(model: Trainable, path: Path) -> Position:
    """Load the verified checkpoint at `path`, which may come from another parallel layout; return how far it had come.

    What the configuration says of rates and schedule holds, whatever the run that saved it had: it may be longer.
    ValueError for a checkpoint without the number of samples.
    """
    state = _state(model, Position(), is_loading=True)
    saved = dist_checkpointing.load_common_state_dict(str(path))
    if "samples" not in saved:
        raise Refused(
            f"{path} does not say how many samples its run had consumed: it is of a version that ordered them "
            f"otherwise, so some would come again and some never; start a new run in another output_dir"
        )
    if saved["random_layout"] != _random_layout():
        # Other tensor or pipeline ranks than these drew the saved numbers. Nothing but dropout would draw more.
        del state["random"]
    loaded = dist_checkpointing.load(state, str(path))
    model.bare_model.load_state_dict(loaded["model"])
    _load_optimizer(model, loaded["optimizer"])
    model.scheduler.num_steps = 0  # Megatron adds what it loads: a run that goes back has made steps already
    model.scheduler.load_state_dict(loaded["scheduler"])
    if "random" in state:
        _set_random_states(loaded["random"])
    return Position(loaded["step"], loaded["samples"])


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


def _state(model: Trainable, position: Position, is_loading: bool) -> dict[str, Any]:
    weights = model.bare_model.sharded_state_dict(metadata=sharding_metadata(model.config))
    return {
        "model": weights,
        "optimizer": model.optimizer.sharded_state_dict({"model": weights}, is_loading=is_loading),
        "scheduler": model.scheduler.state_dict(),
        "random": _random_states(),
        "random_layout": _random_layout(),
        **position._asdict(),
    }


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
