"""Who may start in a run's folder, and what a launch finds and leaves there."""

import json
import os

import pytest
import yaml

from launch_cases import tiny, tiny_file
from nsa_dist.train.identity import FIXED, FREE, FREE_SECTIONS, INSTRUCTIONS
from nsa_launch.config import RunConfig, load
from nsa_launch.run_folder import RunFolder, claimed


@pytest.fixture
def started(tmp_path) -> RunFolder:
    """A folder in which a run has begun, was asked to stop, and has a checkpoint after step 7."""
    with claimed(tiny(tmp_path)) as folder:
        pass
    folder.output.make_checkpoint(7)
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


def test_overwriting_removes_the_old_run_and_nothing_of_the_users(tmp_path, started):
    (started.ray / "launch-20261128-120000-1-0").mkdir(parents=True)
    users = [started.logs / "mine.log", started.ray / "mine", started.path / "notes.txt"]
    for path in users:
        path.write_text("the user's")
    with claimed(tiny(tmp_path, "overwrite=true")) as folder:
        assert folder.checkpointed_step() == 0
        assert not folder.output.metrics.exists()
        assert not folder.launches.exists()
        assert list(folder.logs.iterdir()) == [started.logs / "mine.log"]
        assert list(folder.ray.iterdir()) == [started.ray / "mine"]
    assert all(path.read_text() == "the user's" for path in users)


@pytest.mark.parametrize(
    "name", ["logs/rank-0000.log", "ray/launch-1/x", "launches.jsonl", "config.yaml", "topology.json", "STOP"]
)
@pytest.mark.parametrize("words", [[], ["overwrite=true"], ["resume=true"]])
def test_a_folder_that_never_held_a_run_is_left_as_it_is(tmp_path, name, words):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("the user's")
    with (
        pytest.raises(ValueError, match=r"move (it|them) away, or take another output_dir"),
        claimed(tiny(tmp_path, *words)),
    ):
        pass
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "the user's"


@pytest.mark.parametrize("text", ["", "SIGTERM"])
def test_a_stop_from_before_the_first_start_is_taken_away(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").write_text(text)
    with claimed(tiny(tmp_path, "resume=true")) as folder:
        assert not folder.stop.exists()


def test_a_lock_of_anothers_keeps_its_content(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("the user's")
    with claimed(tiny(tmp_path)):
        pass
    assert (tmp_path / "run/.lock").read_text() == "the user's"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"cannot be used.*name a folder that can be written to"),
        claimed(tiny(tmp_path, f"output_dir={tmp_path}/file/run")),
    ):
        pass


def test_linked_logs_are_refused_before_anything_is_touched(tmp_path, started):
    os.rename(started.logs, tmp_path / "elsewhere")
    started.logs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="symbolic link"), claimed(tiny(tmp_path, "overwrite=true")):
        pass
    assert started.checkpointed_step() == 7
    assert started.rank_log(0).read_text() == "old\n"


def test_the_saved_configuration_goes_on_and_never_removes(tmp_path):
    with claimed(tiny(tmp_path, "overwrite=true")) as folder:
        folder.output.metrics.write_text('{"kind": "train", "step": 1}\n')
    saved = folder.path / "config.yaml"
    assert not {"resume", "overwrite"} & yaml.safe_load(saved.read_text())["run"].keys()
    with pytest.raises(ValueError, match="set resume=true"), claimed(load(saved)):
        pass
    with claimed(load(saved, ["resume=true"])) as folder:
        assert folder.output.metrics.exists()


def test_a_file_that_overwrites_cannot_be_resumed_by_a_word(tmp_path):
    path = tiny_file(tmp_path)
    path.write_text(path.read_text().replace("run:\n", "run:\n  overwrite: true\n"))
    with pytest.raises(ValueError, match="not both can be done"):
        load(path, ["resume=true"])
    assert load(path, ["resume=true", "overwrite=false"]).run.resume


def test_a_moved_run_is_not_begun_anew_by_its_own_file(tmp_path, started):
    os.rename(started.path, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"give output_dir=.*moved"):
        load(tmp_path / "moved/config.yaml", ["resume=true"])
    with claimed(load(tmp_path / "moved/config.yaml", ["resume=true", f"output_dir={tmp_path}/moved"])) as folder:
        assert folder.checkpointed_step() == 7


def test_every_key_may_change_at_a_resume_or_may_not():
    """A new key fails here until somebody decides: `nsa_dist.train.identity`."""
    keys = {
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        for name in field.annotation.model_fields
        if section not in FREE_SECTIONS
    }
    assert keys == FIXED.keys() | FREE | INSTRUCTIONS
    assert RunConfig.model_fields.keys() >= FREE_SECTIONS


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
