"""Small runs of `nsa_dist.train`, and what their ranks do: importable, because spawned processes find work by name."""

import os
import pickle
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import yaml

from damages import contents, some_damage, some_damage_of_another_file, unhurt
from nsa_dist.train import loop
from nsa_dist.train.checkpoint import Position
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.config_errors import parse
from nsa_dist.train.data.samples import Samples
from nsa_dist.train.files.candidates import name_of
from nsa_dist.train.files.records import read_metrics
from nsa_dist.train.hooks import Hooks
from nsa_dist.train.loop import TrainResult, train

ROOT = Path(__file__).parent.parent
STEPS, FORK_STEP, KILL_STEP, BF16_STEPS = 6, 2, 5, 4
KEPT = 80  # tokens whose far context is asked for

# Every layout goes on from one checkpoint of a single process.
LAYOUTS: dict[str, dict] = {
    "CP2 zigzag": {"parallel": {"context_parallel_size": 2}},
    "CP2 contiguous": {"parallel": {"context_parallel_size": 2, "layout": "contiguous"}},
    "DP2": {},
    "TP2": {"parallel": {"tensor_model_parallel_size": 2}},
    "TP2 with sequence parallelism": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "CP2 with recompute": {"parallel": {"context_parallel_size": 2}, "model": {"recompute_attention": True}},
    "CP2 with whole shards": {"parallel": {"context_parallel_size": 2, "whole_shard_fraction": 0.01}},
    "CP2 with kept pages in rounds": {
        "parallel": {"context_parallel_size": 2, "keep_pages": True, "kv_fetch_budget_bytes": 4096}
    },
}
TINY_JOBS: dict[str, dict] = {
    "CP2 zigzag": {"context_parallel_size": 2, "layout": "zigzag"},
    "CP2 contiguous": {"context_parallel_size": 2, "layout": "contiguous"},
}


def write_texts(folder: Path, num_files: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_files):
        (folder / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}\n" for j in range(400)))
    return folder


def small_config(base: Path, name: str, **sections: dict) -> TrainConfig:
    """16 blocks of which 4 are selected, two layers, a second to train; packs have runs of their own."""
    raw: dict[str, dict] = {
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_query_groups": 2, "head_dim": 8, "ffn_hidden_size": 48,
            "init_std": 0.1,
        },
        "nsa": {
            "cmp_block_len": 8, "cmp_stride": 4, "slc_block_len": 16, "num_slc_blocks": 4, "window_len": 20,
        },
        "data": {"folder": base / "texts", "validation_fraction": 0.25, "documents": "whole"},
        "optimizer": {"warmup_steps": 2},
        "run": {
            "output_dir": base / name, "steps": STEPS, "sequence_length": 256, "global_batch_size": 4,
            "micro_batch_size": 2, "eval_interval": 3, "eval_batches": 1, "checkpoint_interval": 2,
        },
    }  # fmt: skip
    for section, keys in sections.items():
        raw[section] = {**raw.get(section, {}), **keys}
    return parse(TrainConfig, raw, "small")


def run(config: TrainConfig, hooks: Hooks | None = None) -> TrainResult:
    return train(config, hooks or Hooks(), torch.device("cpu"))


def copied(rank: int, source: Path, target: Path) -> None:
    """A run's folder, for all ranks at once, who go on there."""
    if rank == 0:
        shutil.copytree(source, target)
    dist.barrier()


def records(base: Path, name: str, kind: str = "train") -> list[dict]:
    return read_metrics(base / name / "metrics.jsonl", kind)


def largest_difference(got: list[dict], expected: list[dict], names=("loss", "grad_norm")) -> float:
    """Relative, over all steps."""
    assert [r["step"] for r in got] == [r["step"] for r in expected]
    return max(abs(g[n] - e[n]) / abs(e[n]) for g, e in zip(got, expected, strict=True) for n in names)


class StopAfter(Hooks):
    """Asks for an end after the given step of this launch, and keeps what it was given to read."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.notices: list[str] = []

    def on_notice(self, text) -> None:
        self.notices.append(text)

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left == 0


class KillAfter(StopAfter):
    """Dies without a word in the given step."""

    def should_stop(self) -> bool:
        if super().should_stop():
            os.kill(os.getpid(), signal.SIGKILL)
        return False


class Listener(Hooks):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.checkpoints: list[tuple[int, str, list[str]]] = []
        self.num_records = 0
        self.notices: list[str] = []

    def on_notice(self, text) -> None:
        self.notices.append(text)

    def on_checkpoint(self, step, path, metrics) -> None:
        self.checkpoints.append((step, path.name, sorted(metrics)))

    def on_metrics(self, record) -> None:
        self.num_records += 1


class Single(NamedTuple):
    """What `single_process` saw."""

    stopped: TrainResult
    ended: TrainResult
    listener: Listener
    notices: list[str]  # of the run that stopped
    changed: "Seen"


@dataclass
class Seen:
    """The numbers of the samples that were trained on, and the optimizer's groups after each step."""

    samples: list[int] = field(default_factory=list)
    groups: list[list[dict]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator["Seen"]:
        get, step = Samples.__getitem__, loop.train_step

        def seen_get(samples: Samples, n: int) -> dict:
            if samples._documents.path_prefix.endswith("train"):
                self.samples.append(n)
            return get(samples, n)

        def seen_step(model, *arguments):
            result = step(model, *arguments)
            groups = model.optimizer.param_groups
            self.groups.append([{k: v for k, v in group.items() if k != "params"} for group in groups])
            return result

        with patch.object(Samples, "__getitem__", seen_get), patch.object(loop, "train_step", seen_step):
            yield self


# Everything that may change at a resume in one process, but for the lengths of the run.
CHANGED: dict[str, dict] = {
    "run": {"global_batch_size": 2, "micro_batch_size": 1, "eval_interval": 2, "checkpoint_interval": 3},
    "model": {"recompute_attention": True},
    "optimizer": {
        "lr": 2e-3, "min_lr": 1e-4, "schedule": "linear", "warmup_steps": 1, "weight_decay": 0.3, "clip_grad": 0.5,
        "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-6,
    },
}  # fmt: skip


def single_process(rank: int, base: Path) -> Single:
    """A run that stops at FORK_STEP; copies of it that go on, two with other settings; and the tiny job."""
    first = StopAfter(FORK_STEP)
    stopped = run(small_config(base, "fork"), first)
    shutil.copytree(base / "fork", base / "single")
    listener = Listener()
    ended = run(small_config(base, "single").resuming(), listener)
    shutil.copytree(base / "fork", base / "longer")
    run(small_config(base, "longer", run={"steps": STEPS + 2}, optimizer={"lr": 2e-3, "warmup_steps": 2}).resuming())
    shutil.copytree(base / "fork", base / "changed")
    with Seen().watching() as changed:
        run(small_config(base, "changed", **CHANGED).resuming())
    tiny_job(base, "CP1", {"context_parallel_size": 1})
    return Single(stopped, ended, listener, first.notices, changed)


def two_processes(rank: int, base: Path) -> None:
    """Every layout from the fork to the end; an undisturbed run; the tiny jobs. Without pictures: `single` has them."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        _two_processes(rank, base)


def _two_processes(rank: int, base: Path) -> None:
    for name, sections in LAYOUTS.items():
        copied(rank, base / "fork", base / name)
        run(small_config(base, name, **sections, run={"checkpoint_interval": STEPS}).resuming())
    run(small_config(base, "undisturbed", **LAYOUTS["CP2 zigzag"]))
    run(bf16_config(base, "bf16"), StopAfter(BF16_STEPS))
    run(bf16_config(base, "bf16 in two parts"), StopAfter(FORK_STEP))
    run(bf16_config(base, "bf16 in two parts").resuming(), StopAfter(BF16_STEPS - FORK_STEP))
    past_damage(rank, base)
    for name, parallel in TINY_JOBS.items():
        tiny_job(base, name, parallel)


def past_damage(rank: int, base: Path) -> None:
    """A copy of the undisturbed run, whose last checkpoint is damaged so that reading it would leave a trace."""
    if rank == 0:
        shutil.copytree(base / "undisturbed", base / "damaged")
        (base / "damaged" / name_of(STEPS) / ".metadata").write_bytes(pickle.dumps(Trap(base / "executed")))
    dist.barrier()
    run(small_config(base, "damaged", **LAYOUTS["CP2 zigzag"]).resuming())


@dataclass
class Trap:
    """Reading the pickle of one makes a file."""

    path: Path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def undisturbed_and_stopped(rank: int, base: Path) -> None:
    """A run of 8 steps, and one that stops after 6 of them and has kept three checkpoints."""
    config = {"steps": 8, "keep_checkpoints": 3}
    run(small_config(base, "undisturbed", run=config))
    run(small_config(base, "stopped", run=config), StopAfter(6))


class Told(NamedTuple):
    """What came of drawn damages."""

    done: list[str]
    whole: list[int]  # the steps whose checkpoints they left as they were, newest first
    latest_changed: bool
    hurt: list[str]  # of the files that are in no checkpoint, those that are not as they were
    step: int  # from which a copy of the run went on; -1: refused
    said: str


def past_drawn_damages(rank: int, base: Path, seeds: range) -> list[Told]:
    """For each seed a copy of the run that stopped, damaged and resumed."""
    return [_past_drawn_damages(base, seed) for seed in seeds]


def _past_drawn_damages(base: Path, seed: int) -> Told:
    draw, folder, listener = random.Random(seed), base / f"seed {seed}", Listener()
    shutil.copytree(base / "stopped", folder)
    packed = contents(folder / "data")
    before, latest = {step: contents(folder / name_of(step)) for step in (2, 4, 6)}, folder / "latest.json"
    damages = [some_damage, some_damage, some_damage_of_another_file]
    done = [draw.choice(damages)(folder, draw) for _ in range(draw.choice([1, 1, 1, 2, 3, 6]))]
    whole = unhurt(folder, before)
    changed = latest.read_bytes() != (base / "stopped/latest.json").read_bytes()
    hurt = [f"data/{name}" for name, text in packed.items() if contents(folder / "data").get(name) != text]
    marker, was = folder / "run.json", (base / "stopped/run.json").read_bytes()
    hurt += ["run.json"] if not marker.exists() or marker.read_bytes() != was else []
    try:
        run(small_config(base, folder.name, run={"steps": 8, "keep_checkpoints": 3}).resuming(), listener)
    except ValueError as refusal:
        return Told(done, whole, changed, hurt, -1, str(refusal))
    return Told(
        done, whole, changed, hurt, records(base, folder.name, "start")[-1]["step"], "\n".join(listener.notices)
    )


def bf16_config(base: Path, name: str) -> TrainConfig:
    return small_config(base, name, **LAYOUTS["CP2 zigzag"], run={"dtype": "bf16"})


def killed(rank: int, base: Path) -> None:
    run(small_config(base, "killed", **LAYOUTS["CP2 zigzag"]), KillAfter(KILL_STEP))


def refused(rank: int, base: Path) -> list[str]:
    """What this rank was told when the run was asked to go on as others."""
    told = []
    for name, sections in {"undisturbed": {"run": {"seed": 7}}, "fork": {}, "spoiled": {}}.items():
        config = small_config(base, name, **sections)
        try:
            run(config if name == "fork" else config.resuming())
        except ValueError as error:
            told.append(str(error))
    return told


def counts_no_samples(rank: int, base: Path, name: str) -> None:
    """A run of a step whose checkpoint is like those from before samples were counted."""
    with patch.object(Position, "_asdict", lambda position: {"step": position.step}):
        run(small_config(base, name), StopAfter(1))


def goes_on(rank: int, base: Path, name: str) -> TrainResult:
    return run(small_config(base, name).resuming())


def resumed(rank: int, base: Path) -> TrainResult:
    return run(small_config(base, "killed", **LAYOUTS["CP2 zigzag"]).resuming())


def tiny_job(base: Path, name: str, parallel: dict) -> None:
    """The first steps of configs/tiny-cpu.yaml, over half of its sequence."""
    raw = tiny_config()
    raw["parallel"] = parallel
    raw["run"].update(output_dir=base / "tiny" / name, steps=2, sequence_length=2048, eval_batches=1)
    raw["optimizer"]["warmup_steps"] = 1
    run(parse(TrainConfig, raw, "tiny-cpu.yaml"))


def whole_tiny_job(rank: int, base: Path, name: str, parallel: dict, validated: bool) -> None:
    """All steps of configs/tiny-cpu.yaml as it is shipped, but for the layout and what changes no training step."""
    raw = tiny_config()
    raw["parallel"].update(parallel)
    raw["run"].update(output_dir=base / name, checkpoint_interval=raw["run"]["steps"])
    if not validated:
        raw["run"].update(eval_interval=raw["run"]["steps"], eval_batches=1)
    run(parse(TrainConfig, raw, "tiny-cpu.yaml"))


def tiny_config() -> dict:
    """configs/tiny-cpu.yaml without the launcher's section."""
    raw = yaml.safe_load((ROOT / "configs/tiny-cpu.yaml").read_text())
    raw.pop("launch")
    return raw


def stops(rank: int, base: Path, name: str) -> TrainResult:
    return run(small_config(base, name), StopAfter(FORK_STEP))


def evaluates_far_context(rank: int, base: Path, name: str, documents: str, parallel: dict) -> None:
    one = {"steps": 2, "eval_interval": 2, "checkpoint_interval": 2, "eval_far_context": KEPT}
    config = small_config(base, name, parallel=parallel, optimizer={"warmup_steps": 1})
    config = config.model_copy(update={"run": config.run.model_copy(update=one)})
    run(config.model_copy(update={"data": config.data.model_copy(update={"documents": documents})}))
