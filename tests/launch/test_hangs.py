"""A rank that hangs: found after the process groups' timeout, named, said while it hangs, removed, made good."""

import json
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from launch_cases import Command, tiny_file
from nsa_launch.run_folder import RunFolder

STEPS = 40
TIMEOUT_S = 60.5  # a checkpoint on a busy machine has taken more than 12 s, which is a hang to 12.5

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path) -> Command:
    return Command(tiny_file(tmp_path), tmp_path)


def stop_rank(command: Command, folder: RunFolder, rank: int) -> int:
    """SIGSTOP to its process once a step behind a checkpoint was made; the process."""
    command.wait_until(lambda: command.last_step() >= 7)
    pid = json.loads(folder.topology.read_text())[rank]["pid"]
    os.kill(pid, signal.SIGSTOP)
    return pid


def is_there(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    with suppress(FileNotFoundError, ProcessLookupError):
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


LAUNCHERS = {"ray": lambda command: command.started, "torchrun": lambda command: partial(command.torchrun_started, 1)}


@pytest.mark.parametrize(("launcher", "rank"), [("ray", 1), ("torchrun", 0)])
def test_a_stopped_rank_is_said_named_removed_and_made_good(command, tmp_path, launcher, rank):
    folder = RunFolder(tmp_path / "run")
    started = LAUNCHERS[launcher](command)
    with started(f"steps={STEPS}", f"process_group_timeout_s={TIMEOUT_S}") as launch:
        hung = stop_rank(command, folder, rank)
        try:
            command.wait_until(lambda: bool(command.events("standstill")))
            command.wait_until(lambda: bool(command.events("failure")))
            command.wait_until(lambda: not is_there(hung))
            command.wait_until(lambda: len(command.events("start")) == 2)
            assert launch.wait(command.patience_s) == 0
        finally:
            with suppress(ProcessLookupError):
                os.kill(hung, signal.SIGKILL)
    (failure,) = command.events("failure")
    assert "Timed out waiting 60500ms" in failure["ranks"][str(1 - rank)], "of a context-parallel group, by a fraction"
    assert list(failure["hung"]) == [str(rank)]
    assert f"its process {hung} has given no sign" in failure["hung"][str(rank)]
    told = [event["lines"] for event in command.events("standstill")]
    (standstill, *_) = [
        lines for lines in told if any(f"its process {hung} has given no sign" in line for line in lines)
    ]
    assert any(f"rank {1 - rank} on " in line and "waits in step" in line for line in standstill)
    said = command.said()
    assert standstill[0] in said
    assert f"rank {rank} {failure['hung'][str(rank)]}" in said
    if launcher == "ray":
        assert "all ranks start again from the last checkpoint (1 of 3 times)" in said
    first: dict[int, float] = {}
    for record in command.train_records():  # those made twice are the same to the bit
        assert first.setdefault(record["step"], record["loss"]) == record["loss"]
    assert sorted(first) == list(range(1, STEPS + 1))
