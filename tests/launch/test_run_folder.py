"""Who may start in a run's folder, and what a launch finds and leaves there."""

import json

import pytest

from launch_cases import tiny
from nsa_launch.config import load
from nsa_launch.run_folder import RunFolder, claimed


@pytest.fixture
def started(tmp_path) -> RunFolder:
    """A folder in which a run has begun, was asked to stop, and has a checkpoint after step 7."""
    folder = RunFolder(tmp_path / "run")
    folder.logs.mkdir(parents=True)
    folder.output.metrics.write_text('{"kind": "train", "step": 7, "loss": 5.0}\n')
    folder.output.set_latest(7)
    folder.record("start", step=0)
    folder.rank_log(0).write_text("old\n")
    folder.stop.touch()
    return folder


def test_a_new_folder_gets_its_configuration(tmp_path):
    config = tiny(tmp_path)
    with claimed(config) as folder:
        assert folder.checkpointed_step() == 0
        assert load(folder.path / "config.yaml") == config


def test_a_begun_run_is_not_overwritten_unasked(tmp_path, started):
    with (
        pytest.raises(
            ValueError, match=r"already holds a run .*set resume=true .* overwrite=true .* another output_dir"
        ),
        claimed(tiny(tmp_path)),
    ):
        pass
    assert started.rank_log(0).read_text() == "old\n"


def test_resuming_keeps_everything_but_the_stop(tmp_path, started):
    with claimed(tiny(tmp_path, "resume=true")) as folder:
        assert folder.checkpointed_step() == 7
        assert folder.rank_log(0).read_text() == "old\n"
        assert not folder.stop.exists()


def test_overwriting_removes_the_old_run(tmp_path, started):
    with claimed(tiny(tmp_path, "overwrite=true")) as folder:
        assert folder.checkpointed_step() == 0
        assert not folder.output.metrics.exists()
        assert not folder.launches.exists()
        assert list(folder.logs.iterdir()) == []


def test_two_launches_cannot_share_a_folder(tmp_path):
    config = tiny(tmp_path)
    with (
        claimed(config),
        pytest.raises(ValueError, match=r"another launch is at work .*another output_dir"),
        claimed(config),
    ):
        pass
    with claimed(config):  # the lock ends with its launch
        pass


def test_events_are_one_line_each(tmp_path):
    with claimed(tiny(tmp_path)) as folder:
        folder.record("start", step=3)
        folder.record("end", step=9)
        events = [json.loads(line) for line in folder.launches.read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("start", 3), ("end", 9)]
