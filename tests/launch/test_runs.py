"""One run through everything that may happen to it: a rank is killed, Ctrl-C, and the rest without Ray.

A tiny model trains twice over the same 60 steps. Once undisturbed, through torchrun. Once through Ray, where rank 1 is
killed with SIGKILL, the command gets a Ctrl-C after it has recovered, and torchrun takes the run to its end. Every
loss of the second must be that of the first, bit for bit, those of repeated steps included.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch_cases import tiny_file
from nsa_dist.train.records import MetricsFollower
from nsa_launch.run_folder import RunFolder

STEPS = 60
PATIENCE_S = 600  # a machine may be busy; nothing here waits for a time to pass


@dataclass(frozen=True)
class Story:
    """What the two runs left behind."""

    undisturbed: RunFolder
    disturbed: RunFolder
    killed_after: int
    interrupted_at: int
    exit_code: int
    said: str


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    home, once, twice = (tmp_path_factory.mktemp(name) for name in ("home", "undisturbed", "disturbed"))
    corpus = _corpus(home)
    environment = {**os.environ, "HOME": str(home)}  # where Ray leaves a token
    environment.pop("RAY_ADDRESS", None)
    subprocess.run(_torchrun(tiny_file(once, corpus)), check=True, env=environment, timeout=PATIENCE_S)

    config, folder = tiny_file(twice, corpus), RunFolder(twice / "run")
    command = [sys.executable, "-m", "nsa_launch", "train", str(config), f"steps={STEPS}"]
    with (twice / "said").open("w") as said, _ended(command, environment, said) as launch:
        wait_until(lambda: last_step(folder) >= 7, launch)
        killed_after = last_step(folder)
        os.kill(json.loads(folder.topology.read_text())[1]["pid"], signal.SIGKILL)
        wait_until(lambda: len(events(folder, "start")) == 2, launch)
        num_records = len(train_records(folder))
        wait_until(lambda: len(train_records(folder)) > num_records, launch)
        os.killpg(launch.pid, signal.SIGINT)  # a terminal sends it to every process of the command
        exit_code = launch.wait(PATIENCE_S)
    interrupted_at = last_step(folder)
    assert folder.checkpointed_step() == interrupted_at
    subprocess.run(_torchrun(config, "resume=true"), check=True, env=environment, timeout=PATIENCE_S)
    return Story(RunFolder(once / "run"), folder, killed_after, interrupted_at, exit_code, (twice / "said").read_text())


def _torchrun(config: Path, *words: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "-m", "nsa_launch.torchrun", str(config), f"steps={STEPS}", *words]


def _corpus(folder: Path) -> Path:
    texts = folder / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}\n" for j in range(2000)))
    return texts


class _ended:
    """A process of its own group that does not outlive the test, whatever happens."""

    def __init__(self, command: list[str], environment: dict[str, str], said) -> None:
        self._process = subprocess.Popen(
            command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> subprocess.Popen:
        return self._process

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def wait_until(happened: Callable[[], bool], launch: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert launch.poll() is None, f"the command ended early with exit code {launch.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)  # between two looks


def events(folder: RunFolder, kind: str) -> list[dict]:
    return [event for event in MetricsFollower(folder.launches).poll() if event["event"] == kind]


def train_records(folder: RunFolder) -> list[dict]:
    return [record for record in MetricsFollower(folder.output.metrics).poll() if record["kind"] == "train"]


def last_step(folder: RunFolder) -> int:
    return max((record["step"] for record in train_records(folder)), default=0)


def test_a_killed_rank_is_made_good(story):
    first, second, third = events(story.disturbed, "start")
    assert first["step"] == 0
    assert 5 <= second["step"] <= story.killed_after + 1
    assert second["step"] % 5 == 0  # the last checkpoint
    assert third["step"] == story.interrupted_at  # torchrun's, after Ctrl-C
    (failure,) = events(story.disturbed, "failure")
    assert "1" in failure["ranks"]


def test_ctrl_c_saves_where_it_stopped(story):
    assert story.exit_code == 130
    assert second_start(story) < story.interrupted_at < STEPS
    assert events(story.disturbed, "stop")[0]["step"] == story.interrupted_at
    assert not story.disturbed.stop.exists()  # the next launch took it away


def second_start(story: Story) -> int:
    return events(story.disturbed, "start")[1]["step"]


def test_every_loss_is_that_of_the_undisturbed_run(story):
    undisturbed = {record["step"]: record["loss"] for record in train_records(story.undisturbed)}
    disturbed = train_records(story.disturbed)
    assert list(undisturbed) == list(range(1, STEPS + 1))
    assert {record["step"] for record in disturbed} == set(undisturbed)
    assert [(r["step"], r["loss"]) for r in disturbed] == [(r["step"], undisturbed[r["step"]]) for r in disturbed]
    assert len(disturbed) > STEPS  # some steps were made twice


def test_the_ranks_are_listed_where_they_ran(story):
    ranks = json.loads(story.disturbed.topology.read_text())
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert len({rank["pid"] for rank in ranks}) == 2
    assert {rank["device"] for rank in ranks} == {"cpu"}


def test_the_console_stays_short_and_says_what_happened(story):
    lines = story.said.splitlines()
    assert len(lines) < 40
    assert "Traceback" not in story.said
    assert "2 ranks are up, training from step 0" in lines
    assert any("died; all ranks start again from the last checkpoint (1 of 3 times)" in line for line in lines)
    assert any(line.startswith("SIGINT: the ranks save a checkpoint and stop") for line in lines)
    assert f"stopped after step {story.interrupted_at} of {STEPS}" in lines
