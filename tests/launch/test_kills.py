"""Fifty kills at random times of random processes: losses and weights stay the undisturbed run's, and nothing is left.

A rank, Ray Train's controller, the raylet, the driver, or two at once, by SIGKILL. Up to five a run, as many runs as it
takes: about three quarters of an hour on two cores.
"""

import random
import shutil
from pathlib import Path

import pytest
import torch

from kills import Killed, left_behind, run_through, weights
from launch_cases import Command, tiny_file
from nsa_launch.run_folder import RunFolder
from train_cases import write_texts
from two_hosts import Host, missing, one_host

pytestmark = pytest.mark.slow
STEPS, KILLS, KILLS_EACH = 120, 50, 5
WORDS = [f"steps={STEPS}", "max_failures=1000", "checkpoint_interval=5"]


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if why := missing():
        pytest.skip(f"a host of their own cannot be made on this machine: {why}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Killed:
    home = tmp_path_factory.mktemp("undisturbed")
    Command(tiny_file(home, write_texts(home / "texts")), home).torchrun(*WORDS)
    return Killed(RunFolder(home / "run"))


@pytest.fixture
def host(tmp_path):
    with one_host(tmp_path) as made:
        yield made


def last_checkpoint(run: Killed) -> Path:
    return run.folder.output.checkpoint(STEPS)


def test_kills_change_nothing_and_leave_nothing(tmp_path, host: Host, undisturbed):
    """Runs, one after the other, until there were so many."""
    write_texts(tmp_path / "texts")
    num_kills = 0
    for number in range(KILLS):
        if num_kills == KILLS:
            break
        place = tmp_path / f"run {number}"
        place.mkdir()
        draw, most = random.Random(number), min(KILLS_EACH, KILLS - num_kills)
        config = tiny_file(place, tmp_path / "texts")
        run = run_through(host, config, RunFolder(place / "run"), WORDS, draw, most)
        print(f"{place.name}: killed {', '.join(run.kills)}; exit codes {run.exits}", flush=True)
        judge(run, undisturbed)
        left = left_behind(host, run.folder)
        assert not left, "\n".join([place.name, *run.kills, *left])
        num_kills += len(run.kills)
        shutil.rmtree(place)
    assert num_kills == KILLS


def judge(run: Killed, undisturbed: Killed) -> None:
    assert "Traceback" not in run.said, run.said.partition("Traceback")[2][:3000]
    once = {step: (loss, norm) for step, loss, norm in undisturbed.losses()}
    assert {step for step, *_ in run.losses()} == set(once) == set(range(1, STEPS + 1))
    for step, loss, norm in run.losses():  # those made again included
        assert (loss, norm) == once[step], (step, run.kills)
    mine, theirs = weights(last_checkpoint(run)), weights(last_checkpoint(undisturbed))
    assert mine.keys() == theirs.keys()
    assert len(mine) > 10
    assert all(torch.equal(mine[name], theirs[name]) for name in mine), run.kills
