"""The other ways a run through Ray may end, each with its exit code and its last words."""

import json
import os
import signal
from contextlib import suppress

import pytest

from launch_cases import Command, tiny_file
from nsa_launch import exit_codes
from nsa_launch.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path) -> Command:
    return Command(tiny_file(tmp_path), tmp_path)


def test_one_failure_too_many_shows_what_the_rank_wrote(command, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with command.started("steps=1000", "max_failures=0") as launch:
        command.wait_until(lambda: command.last_step() >= 1)
        victim = json.loads(folder.topology.read_text())[0]["pid"]
        os.kill(victim, signal.SIGABRT)
        assert launch.wait(command.patience_s) == exit_codes.FAILED
    said = command.said()
    assert "rank 0 died; that was one failure more than launch.max_failures=0" in said
    assert f"--- rank 0: the end of {folder.rank_log(0)}" in said
    assert "Fatal Python error: Aborted" in said


def test_what_a_rank_refuses_is_not_tried_again(command, tmp_path):
    (tmp_path / "empty").mkdir()
    with command.started(f"folder={tmp_path / 'empty'}") as launch:
        assert launch.wait(command.patience_s) == exit_codes.BAD_CONFIG
    assert str(tmp_path / "empty") in command.said().splitlines()[-1]


def test_a_second_signal_does_not_wait_for_the_ranks(command, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with command.started("steps=1000") as launch:
        command.wait_until(lambda: command.last_step() >= 1)
        hung = json.loads(folder.topology.read_text())[1]["pid"]
        try:
            os.kill(hung, signal.SIGSTOP)  # the ranks will never answer the first
            launch.terminate()
            command.wait_until(folder.stop.exists)
            launch.terminate()
            assert launch.wait(command.patience_s) == exit_codes.stopped_by(signal.SIGTERM)
        finally:
            with suppress(ProcessLookupError):
                os.kill(hung, signal.SIGKILL)
    assert "stopped without an answer from the ranks" in command.said()


@pytest.mark.parametrize("by_file", [False, True])
def test_a_stop_before_the_ranks_are_up_is_immediate(command, tmp_path, by_file):
    folder = RunFolder(tmp_path / "run")
    with command.started() as launch:
        command.wait_until(lambda: bool(command.events("launch")))
        folder.stop.touch() if by_file else launch.terminate()
        ended = exit_codes.OK if by_file else exit_codes.stopped_by(signal.SIGTERM)
        assert launch.wait(command.patience_s) == ended
    assert not folder.output.metrics.exists()
    assert not by_file or "asks for an end, and no rank is up" in command.said()
