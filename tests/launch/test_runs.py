"""One run through everything that may happen to it: a rank is killed, Ctrl-C, and the rest without Ray.

A tiny model trains twice over the same 60 steps. Once undisturbed, by no launcher. Once through Ray, where rank 1 is
killed with SIGKILL, the command gets a Ctrl-C after it has recovered, and torchrun takes the run to its end. Every
loss of the second must be that of the first, bit for bit, those of repeated steps included.
"""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch_cases import Command, tiny_file, trained
from nsa_launch.run_folder import RunFolder
from ranks import run_ranks

STEPS = 60


@dataclass(frozen=True)
class Story:
    """What the two runs left behind."""

    undisturbed: Command
    disturbed: Command
    folder: RunFolder
    killed_after: int
    interrupted_at: int
    exit_code: int
    finished: str  # what torchrun printed at the end of the disturbed run


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    once, twice = (tmp_path_factory.mktemp(name) for name in ("undisturbed", "disturbed"))
    corpus = _corpus(once)
    undisturbed = Command(tiny_file(once, corpus), once)
    run_ranks(2, trained, once / "tiny.yaml", [f"steps={STEPS}"])

    disturbed, folder = Command(tiny_file(twice, corpus), twice), RunFolder(twice / "run")
    with disturbed.started(f"steps={STEPS}") as launch:
        disturbed.wait_until(lambda: disturbed.last_step() >= 7)
        killed_after = disturbed.last_step()
        os.kill(json.loads(folder.topology.read_text())[1]["pid"], signal.SIGKILL)
        disturbed.wait_until(lambda: len(disturbed.events("start")) == 2)
        num_records = len(disturbed.train_records())
        disturbed.wait_until(lambda: len(disturbed.train_records()) > num_records)
        os.killpg(launch.pid, signal.SIGINT)  # a terminal sends it to every process of the command
        exit_code = launch.wait(disturbed.patience_s)
    interrupted_at = folder.checkpointed_step()
    finished = disturbed.torchrun(f"steps={STEPS}", "resume=true")
    return Story(undisturbed, disturbed, folder, killed_after, interrupted_at, exit_code, finished)


def _corpus(folder: Path) -> Path:
    texts = folder / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}\n" for j in range(2000)))
    return texts


def test_a_killed_rank_is_made_good(story):
    first, second, third = story.disturbed.events("start")
    assert first["step"] == 0
    assert 5 <= second["step"] <= story.killed_after + 1
    assert second["step"] % 5 == 0  # the last checkpoint
    assert third["step"] == story.interrupted_at  # torchrun's, after Ctrl-C
    (failure,) = story.disturbed.events("failure")
    assert "1" in failure["ranks"]


def test_ctrl_c_saves_where_it_stopped(story):
    assert story.exit_code == 130
    (stop,) = story.disturbed.events("stop")
    assert stop["step"] == story.interrupted_at < STEPS
    interrupted = [record["step"] for record in story.disturbed.train_records()].index(story.interrupted_at + 1)
    assert story.disturbed.train_records()[interrupted - 1]["step"] == story.interrupted_at  # nothing was lost
    assert not story.folder.stop.exists()  # the next launch took it away


def test_every_loss_is_that_of_the_undisturbed_run(story):
    undisturbed = {record["step"]: record["loss"] for record in story.undisturbed.train_records()}
    disturbed = story.disturbed.train_records()
    assert list(undisturbed) == list(range(1, STEPS + 1))
    assert {record["step"] for record in disturbed} == set(undisturbed)
    assert [(r["step"], r["loss"]) for r in disturbed] == [(r["step"], undisturbed[r["step"]]) for r in disturbed]
    assert len(disturbed) > STEPS  # some steps were made twice


def test_the_ranks_are_listed_where_they_ran(story):
    ranks = json.loads(story.folder.topology.read_text())
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert len({rank["pid"] for rank in ranks}) == 2
    assert {rank["device"] for rank in ranks} == {"cpu"}


def test_the_console_stays_short_and_says_what_happened(story):
    lines = story.disturbed.said().splitlines()
    assert len(lines) < 40
    assert "Traceback" not in story.disturbed.said()
    assert "2 ranks are up, training from step 0" in lines
    assert any("died; all ranks start again from the last checkpoint (1 of 3 times)" in line for line in lines)
    assert any(line.startswith("SIGINT: the ranks save a checkpoint and stop") for line in lines)
    assert f"stopped after step {story.interrupted_at} of {STEPS}" in lines


def test_torchrun_shows_the_same(story):
    lines = story.finished.splitlines()
    assert f"2 ranks are up, training from step {story.interrupted_at}" in lines
    assert f"finished step {STEPS} of {STEPS}" in lines
    assert sum(line.startswith("checkpoints ") for line in lines) == 1  # one rank speaks
