"""Whole runs: every layout against one process, kill and resume, and what a run leaves behind."""

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch.multiprocessing as mp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ranks import run_ranks
from train_cases import (
    FORK_STEP,
    KILL_STEP,
    LAYOUTS,
    STEPS,
    TINY_JOBS,
    killed,
    records,
    resumed,
    single_process,
    two_processes,
    write_texts,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def single(base):
    return run_ranks(1, single_process, base)[0]


@pytest.fixture(scope="module")
def pair(base, single):
    run_ranks(2, two_processes, base)


def largest_difference(got: list[dict], expected: list[dict], names=("loss", "grad_norm")) -> float:
    """Relative, over all steps."""
    assert [r["step"] for r in got] == [r["step"] for r in expected]
    return max(abs(g[n] - e[n]) / abs(e[n]) for g, e in zip(got, expected, strict=True) for n in names)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_one_process(base, pair, name):
    assert largest_difference(records(base, name), records(base, "single")) < 1e-6
    got, expected = (records(base, n, "validation") for n in (name, "single"))
    assert largest_difference(got, expected, names=("loss",)) < 1e-6


def test_recompute_changes_no_bit(base, pair):
    assert losses(records(base, "CP2 with recompute")) == losses(records(base, "CP2 zigzag"))


def test_bf16_trains_like_fp32_and_resumes_with_every_bit(base, pair):
    bf16, fp32 = records(base, "bf16"), records(base, "undisturbed")
    assert largest_difference(bf16, fp32, names=("loss",)) < 0.01
    assert losses(records(base, "bf16 in two parts")) == losses(bf16)


@pytest.mark.parametrize("name", TINY_JOBS)
def test_the_tiny_job_does_not_depend_on_how_it_is_cut(base, pair, name):
    assert largest_difference(records(base, f"tiny/{name}"), records(base, "tiny/CP1"), names=("loss",)) < 1e-4


def losses(run: list[dict]) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in run]


def test_killed_and_resumed_repeats_every_bit(base, pair):
    with pytest.raises(mp.ProcessExitedException):
        run_ranks(2, killed, base)
    before = losses(records(base, "killed"))
    assert before[-1][0] == KILL_STEP - 1, "it died in a step whose checkpoint was not taken yet"
    result, _ = run_ranks(2, resumed, base)
    assert (result.step, result.stopped) == (STEPS, False)
    undisturbed = losses(records(base, "undisturbed"))
    assert before == undisturbed[: KILL_STEP - 1]
    assert losses(records(base, "killed")) == undisturbed
    lines = [json.loads(line) for line in (base / "killed/metrics.jsonl").read_text().splitlines()]
    assert len([r for r in lines if r["kind"] == "train"]) > len(undisturbed) - 1, "some steps were made twice"


def test_a_stopped_run_says_so_and_goes_on(base, single):
    stopped, ended, listener = single
    assert (stopped.step, stopped.stopped) == (FORK_STEP, True)
    assert not (base / "fork/loss.png").exists(), "pictures are of finished runs"
    assert (ended.step, ended.stopped) == (STEPS, False)
    assert ended.train_loss == records(base, "single")[-1]["loss"]
    assert ended.validation_loss == records(base, "single", "validation")[-1]["loss"]
    names = [(4, "step_00000004"), (6, "step_00000006")]
    assert listener.checkpoints == [(*name, ["train_loss", "validation_loss"]) for name in names]
    assert listener.num_records == STEPS - FORK_STEP + 2


def test_a_resumed_run_follows_its_own_schedule(base, single):
    rates = [r["lr"] for r in records(base, "longer")]
    assert len(rates) == STEPS + 2
    assert rates[FORK_STEP] == pytest.approx(2e-3), "warmup ends at the rate of the new configuration"
    done = (STEPS + 2 - 1 - 2) / (STEPS + 2 - 2)  # of the decay, before the last step
    assert rates[-1] == pytest.approx(3e-4 + (2e-3 - 3e-4) * (1 + math.cos(math.pi * done)) / 2)


def test_the_latest_checkpoints_are_kept(base, single):
    assert sorted(p.name for p in (base / "single/checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert json.loads((base / "single/latest.json").read_text()) == {
        "step": STEPS,
        "checkpoint": "checkpoints/step_00000006",
    }


def test_metrics(base, single):
    train, validation = records(base, "single"), records(base, "single", "validation")
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    assert [r["step"] for r in validation] == [0, 3, 6]
    assert train[0]["loss"] == pytest.approx(math.log(256), rel=0.15)
    assert validation[-1]["loss"] < validation[0]["loss"]
    for record in train:
        assert record["tokens"] == record["step"] * 4 * 256
        assert min(record["grad_norm"], record["lr"], record["tokens_per_s"], record["time_s"]) > 0


def test_tensorboard(base, single):
    events = EventAccumulator(str(base / "single/tensorboard")).Reload()
    written = [(e.step, e.value) for e in events.Scalars("train/loss")]
    expected = [(r["step"], r["loss"]) for r in records(base, "single")]
    assert written == [(step, pytest.approx(loss)) for step, loss in expected]
    assert [e.step for e in events.Scalars("validation/loss")] == [0, 3, 6]


@pytest.mark.parametrize("name", ["loss.png", "selection.png"])
def test_pictures(base, single, name):
    picture = matplotlib.image.imread(base / "single" / name)[..., :3]
    assert min(picture.shape[:2]) >= 600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, "lines, letters and their edges"


def test_training_and_validation_files_are_listed(base, single):
    listing = json.loads((base / "single/data/corpus.json").read_text())
    assert set(listing["train"]["files"]).isdisjoint(listing["validation"]["files"])
    assert len(listing["train"]["files"]) + len(listing["validation"]["files"]) == 8
