"""Runs whose steps, replicas or ranks are not well, and what is seen of them. Work for spawned ranks."""

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist

from nsa_dist.train import loop, step
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.samples import Samples
from nsa_dist.train.health import monitor
from nsa_dist.train.health.replicas import hashes_of
from nsa_dist.train.health.work import Work
from nsa_dist.train.hooks import Hooks
from nsa_dist.train.loop import TrainResult
from train_cases import STEPS, StopAfter, run, small_config

BAD_STEP = 4
LAYOUTS: dict[str, dict] = {
    "CP2": {"context_parallel_size": 2},
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
}
HEALTHY = {"health_interval": 2, "replica_check_interval": 1}


def config(base: Path, name: str, parallel: dict, **run_keys) -> TrainConfig:
    return small_config(base, name, parallel=parallel, run={**HEALTHY, **run_keys})


class State(NamedTuple):
    """Of weights and optimizer, whole."""

    weights: dict[str, torch.Tensor]
    moments: list[dict]

    @classmethod
    def of(cls, model) -> "State":
        weights = {name: weight.detach().clone() for name, weight in model.bare_model.named_parameters()}
        states = copy.deepcopy([part.state_dict()["state"] for part in _torch_optimizers(model.optimizer)])
        return cls(weights, states)

    def same_as(self, other: "State") -> bool:
        return _same(self, other)


def _torch_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


class Told(NamedTuple):
    """What one rank saw of a run with steps that are not finite."""

    result: TrainResult
    untouched: list[bool]  # whether the state was the same after each such step
    firsts: list[int]  # of every step, the first of its samples
    weights: dict[str, int]  # hashes at the end


@contextmanager
def spoiled(is_bad: Callable[[int], bool], told: list, firsts: list[int], by: str) -> Iterator[None]:
    """Inside, rank 1's part of every step over samples from `first` on with `is_bad(first)` is not finite.

    by      "loss": of rank 1 alone; "gradient": one number of it, in a weight of rank 1
    """
    train_step, forward_backward = loop.train_step, step._forward_backward

    def seen(model, cutter, dataset, first, *others):
        before, seen.first = State.of(model), first
        result = train_step(model, cutter, dataset, first, *others)
        firsts.append(first)
        if not result.is_finite:
            told.append(State.of(model).same_as(before))
        seen.model = model
        return result

    def poisoned(model, *arguments, forward_only, **others):
        totals = forward_backward(model, *arguments, forward_only=forward_only, **others)
        if not forward_only and is_bad(seen.first) and dist.get_rank() == dist.get_world_size() - 1:
            if by == "loss":
                return totals * math.nan
            next(iter(model.bare_model.parameters())).main_grad.view(-1)[3] = math.inf
        return totals

    with patch.object(loop, "train_step", seen), patch.object(step, "_forward_backward", poisoned):
        yield
    told.append(hashes_of(seen.model))


def with_bad_steps(
    base: Path,
    name: str,
    parallel: dict,
    bad: set[int],
    by: str = "gradient",
    hooks: Hooks | None = None,
    **run_keys,
) -> Told:
    """A run in which the batches that begin with these samples are never finite."""
    told: list = []
    firsts: list[int] = []
    with spoiled(lambda first: first in bad, told, firsts, by):
        result = run(config(base, name, parallel, **run_keys), hooks)
    hashes = {weight: int(value) for weight, value in told.pop().items()}
    return Told(result, told, firsts, hashes)


def bad_steps(rank: int, base: Path) -> dict[str, Told]:
    """Of every way to go on, over several layouts. 4 samples a step, checkpoints after steps 2, 4, 6."""
    bad = {4 * (BAD_STEP - 1)}
    found = {}
    for layout, parallel in LAYOUTS.items():
        found[f"skip {layout}"] = with_bad_steps(base, f"skip {layout}", parallel, bad, not_finite="skip")
    cp = LAYOUTS["CP2"]
    found["loss"] = with_bad_steps(base, "loss", cp, bad, by="loss", not_finite="skip")
    found["stop"] = with_bad_steps(base, "stop", cp, bad)
    found["rewind"] = with_bad_steps(base, "rewind", cp, bad, not_finite="rewind")
    found["rewind twice"] = with_bad_steps(base, "rewind twice", cp, bad | {20}, not_finite="rewind")
    found["same place"] = with_bad_steps(base, "same place", cp, bad | {16}, not_finite="rewind")
    found["no checkpoint"] = with_bad_steps(base, "no checkpoint", cp, {0}, not_finite="rewind")
    all_bad = set(range(0, 4 * STEPS, 4))
    found["too many"] = with_bad_steps(base, "too many", cp, all_bad, not_finite="skip", not_finite_limit=3)
    found["bf16"] = with_bad_steps(base, "bf16", cp, bad, not_finite="skip", dtype="bf16")
    found["no clipping"] = _without_clipping(base, bad)
    with _without_samples(bad):
        found["without them"] = with_bad_steps(base, "without them", cp, set())
    return found


class Phases(Hooks):
    """Remembers what it was told to begin."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []

    def on_phase(self, phase: str, step: int) -> None:
        self.begun.append((phase, step))


def goes_back_and_is_slow(rank: int, base: Path) -> tuple[Told, list[tuple[str, int]], list[float]]:
    hooks = Phases()
    told = with_bad_steps(base, "back", LAYOUTS["CP2"], {12, 16}, hooks=hooks, not_finite="rewind")
    return told, hooks.begun, slow_rank(rank)


def _without_clipping(base: Path, bad: set[int]) -> Told:
    told: list = []
    firsts: list[int] = []
    unclipped = small_config(
        base,
        "no clipping",
        parallel=LAYOUTS["CP2"],
        run={**HEALTHY, "not_finite": "skip"},
        optimizer={"clip_grad": 0.0},
    )
    with spoiled(lambda first: first in bad, told, firsts, "gradient"):
        result = run(unclipped)
    told.pop()
    return Told(result, told, firsts, {})


@contextmanager
def _without_samples(bad: set[int]) -> Iterator[None]:
    """Inside, the batches that begin with these are no part of the training texts."""
    get = Samples.__getitem__

    def passed_over(samples: Samples, n: int) -> dict:
        is_train = samples._documents.path_prefix.endswith("train")
        return get(samples, n + 4 * (is_train and n >= min(bad)))

    with patch.object(Samples, "__getitem__", passed_over):
        yield


def poked_replica(rank: int, base: Path) -> dict[str, TrainResult]:
    """Runs in which the last rank's copy of a weight gets one other bit in step 3, by layout."""
    found = {}
    for layout in ("CP2", "DP2", "TP2"):
        with _poked():
            found[layout] = run(config(base, f"poked {layout}", LAYOUTS[layout]))
    return found


@contextmanager
def _poked() -> Iterator[None]:
    train_step, steps = loop.train_step, []

    def poke(model, *others):
        result = train_step(model, *others)
        steps.append(1)
        if len(steps) == 3 and dist.get_rank() == dist.get_world_size() - 1:
            weight = model.bare_model.decoder.layers[1].self_attention.linear_qkv.weight
            weight.data.view(torch.int32).view(-1)[5] ^= 1
        return result

    with patch.object(loop, "train_step", poke):
        yield


def one_rank(rank: int, base: Path) -> None:
    """The healthy run of one process, whose attention is also watched in plain PyTorch: `plain.pt`."""
    plain: dict[int, list] = {}
    record = monitor.Monitor.record

    def recorded(self, step):
        phi = {
            attention.layer_number: {
                name: weight.detach().clone() for name, weight in attention.core_attention.named_parameters()
            }
            for attention in self.model.attentions.values()
        }
        torch.save({"seen": dict(plain), "phi": phi}, base / f"plain {step}.pt")
        return record(self, step)

    def watched(model, *others):
        plain.clear()
        hooks = [
            attention.core_attention.register_forward_hook(_keeper(plain, attention.layer_number, attention))
            for attention in model.attentions.values()
        ]
        with ExitStack() as stack:
            blocks = {
                a.layer_number: stack.enter_context(a.core_attention.recording_blocks())
                for a in model.attentions.values()
            }
            result = train_step(model, *others)
        for hook in hooks:
            hook.remove()
        for layer, chosen in blocks.items():
            plain[layer] = [(gates, ids) for gates, ids in zip(plain[layer], chosen, strict=True)]
        return result

    run(config(base, "fork", {}), StopAfter(2))
    train_step = loop.train_step
    with patch.object(loop, "train_step", watched), patch.object(monitor.Monitor, "record", recorded):
        run(config(base, "one", {}))


def _keeper(plain: dict, layer: int, attention) -> Callable:
    def keep(module, arguments, output) -> None:
        gate_logits = arguments[2]  # [T, b, Hq, 3]
        plain.setdefault(layer, []).extend(
            torch.sigmoid(gate_logits[:, i].detach()) for i in range(gate_logits.shape[1])
        )

    return keep


def two_ranks(rank: int, base: Path) -> None:
    if rank == 0:  # stages of a pipeline draw other weights
        shutil.copytree(base / "fork", base / "PP2")
    dist.barrier()
    for layout, parallel in LAYOUTS.items():
        made = config(base, layout, parallel)
        run(made.resuming() if layout == "PP2" else made)
    run(small_config(base, "unwatched", parallel=LAYOUTS["CP2"]))
    recomputed = small_config(
        base, "recompute", parallel=LAYOUTS["CP2"], run=HEALTHY, model={"recompute_attention": True}
    )
    run(recomputed)


def slow_rank(rank: int) -> list[float]:
    """Seconds that each rank works in a step in which rank 1 has four times the work."""
    work = Work(torch.device("cpu"))
    x = torch.ones(300, 300)
    dist.barrier()
    with work.measured():
        for _ in range(20):
            for _ in range(8 if rank == 1 else 1):
                x = (x @ x) * 0
            dist.all_reduce(torch.ones(1))
            dist.all_reduce(torch.ones(1), async_op=True).wait()
    assert work.waited_s > 0
    mine = torch.tensor([work.work_s, work.waited_s], dtype=torch.float64)
    rows = [torch.zeros_like(mine) for _ in range(2)]
    dist.all_gather(rows, mine)
    return torch.stack(rows).flatten().tolist()
