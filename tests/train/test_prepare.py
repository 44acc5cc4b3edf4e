"""Who may start in a folder, and what is removed there. No process group, no step."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.files import replace
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.prepare import prepare_output
from prepare_cases import begun, config, overwriting, put, snapshot
from train_cases import write_texts


@pytest.fixture
def base(tmp_path) -> Path:
    write_texts(tmp_path / "texts")
    return tmp_path


# --- what is removed ------------------------------------------------------------------------------------------------

USERS = ["notes.txt", "data/mine/a.txt", "data/train.bin.bak", "checkpoints/step_00000002-kept/weights", "logs/a.log",
         "checkpoints/step_final/weights", "tensorboard/readme", "ray/results.csv", "checkpoints/step_3"]  # fmt: skip


def test_overwriting_removes_what_the_run_made_and_nothing_else(base):
    output = begun(base)
    users = put(output.root, USERS)
    prepare_output(overwriting(base))
    assert snapshot(output.root) == {**users, "run.json": (output.root / "run.json").read_bytes()}


@pytest.mark.parametrize("flag", ["overwrite", "resume", None])
@pytest.mark.parametrize(
    "name",
    ["data/train.bin", "checkpoints/step_00000060/x", "tensorboard/events.out.tfevents.9", "metrics.jsonl", "loss.png"],
)
def test_a_folder_that_never_held_a_run_loses_nothing(base, name, flag):
    users = put(base / "run", [name, "notes.txt"])
    with pytest.raises(
        ValueError, match=r"run\.json does not say that a run made them; move them away, or take another"
    ):
        prepare_output(config(base, run={flag: True} if flag else {}))
    assert snapshot(base / "run") == users


def test_a_folder_with_other_files_may_be_used(base):
    users = put(base / "run", ["data/mine/a.txt", "checkpoints/step_final/weights", "src/train.py"])
    prepare_output(overwriting(base))
    assert users.items() <= snapshot(base / "run").items()


def test_a_run_of_an_older_version_is_neither_continued_nor_removed(base):
    users = put(base / "run", ["latest.json", "metrics.jsonl", "checkpoints/step_00000002/weights"])
    for run in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"without run\.json.*remove that folder yourself"):
            prepare_output(config(base, run=run))
    assert snapshot(base / "run") == users


def test_a_marker_that_a_bit_changed_is_refused_and_an_earlier_versions_is_taken(base):
    prepare_output(config(base))
    path = base / "run/run.json"
    written = path.read_text()
    path.write_text(written.replace('"run.steps": ', '"run.steps": 1'))
    with pytest.raises(ValueError, match=r"run\.json is not .*its own SHA-256 differ.*put it back from a copy"):
        prepare_output(config(base, run={"resume": True}))
    earlier = json.loads(written)
    del earlier["sha256"]
    path.write_text(json.dumps(earlier))
    prepare_output(config(base, run={"resume": True}))


@pytest.mark.parametrize("text", ["{}", "nonsense", "[" * 100_000, '{"format": "nsa-dist run", "version": 2}', "[]"])
def test_a_foreign_marker_vouches_for_nothing(base, text):
    users = put(base / "run", ["metrics.jsonl"])
    (base / "run/run.json").write_text(text)
    with pytest.raises(ValueError, match=r"not the marker of a run.*take another output_dir, or move that file away"):
        prepare_output(overwriting(base))
    assert users.items() <= snapshot(base / "run").items()


@pytest.mark.parametrize("name", ["../texts", "/etc/passwd", "a/../../texts", "*/x", "a/b/c", "", "./.."])
def test_a_marker_cannot_name_what_lies_elsewhere(base, name):
    output = begun(base)
    marker = output.marker()
    marker.changed(made=(*marker.made, name)).write(output.root)
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"outside of the folder"):
        prepare_output(overwriting(base))
    assert snapshot(base) == before


@pytest.mark.parametrize("container", ["checkpoints", "data", "tensorboard"])
def test_a_linked_folder_is_refused_before_anything_is_touched(base, container):
    output = begun(base)
    os.rename(output.root / container, base / "elsewhere")
    (output.root / container).symlink_to(base / "elsewhere")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"is a symbolic link to .*remove the link and what it points to yourself"):
        prepare_output(overwriting(base))
    assert snapshot(base) == before
    prepare_output(config(base).resuming())  # going on works


def test_a_new_run_follows_links_that_were_put_there(base):
    (base / "big").mkdir()
    (base / "run").mkdir()
    (base / "run/checkpoints").symlink_to(base / "big")
    output = begun(base)
    assert (base / "big/step_00000004/weights").exists()
    output.drop_old_checkpoints(keep=1)
    assert [path.name for path in (base / "big").iterdir()] == ["step_00000004"]


@pytest.mark.parametrize("target", ["file", "nowhere"])
@pytest.mark.parametrize("name", ["", "checkpoints", "data"])
def test_what_is_no_folder_is_refused(base, name, target):
    (base / "file").write_text("f")
    path = base / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(base / target)
    with pytest.raises(ValueError, match=r"name another one|move it away"):
        prepare_output(config(base))


def test_a_linked_checkpoint_loses_the_link_alone(base):
    output = begun(base)
    os.rename(output.checkpoint(4), base / "moved")
    output.checkpoint(4).symlink_to(base / "moved")
    prepare_output(overwriting(base))
    assert (base / "moved/weights").exists()
    assert not output.checkpoint(4).is_symlink()


@pytest.mark.parametrize("folder", ["run", "run/data", "run/data/mine", "run/checkpoints/texts", "linked"])
def test_texts_among_the_runs_own_files_are_refused(base, folder):
    (base / "run/data").mkdir(parents=True)
    (base / "linked").symlink_to(base / "run/data")
    users = snapshot(write_texts(base / folder))
    with pytest.raises(ValueError, match=r"keeps its own files.*move the texts to a folder beside it"):
        prepare_output(config(base, data={"folder": base / folder}))
    assert snapshot(base / folder) == users


def test_texts_beside_the_runs_files_stay(base):
    write_texts(base / "run/corpus")
    before = snapshot(base / "run/corpus")
    begun(base, data={"folder": base / "run/corpus"})
    prepare_output(overwriting(base, data={"folder": base / "run/corpus"}))
    assert snapshot(base / "run/corpus") == before


def test_a_runs_own_files_are_not_its_texts(base):
    wanted = config(base, data={"folder": base, "pattern": "*"})
    prepare_output(wanted)
    output = OutputDir(wanted.run.output_dir)
    write_corpus(wanted.data, output.data, but_not=output.root)
    listing = json.loads((output.data / "corpus.json").read_text())
    assert all(name.startswith("texts/") for split in ("train", "validation") for name in listing[split]["files"])


def crash_after(monkeypatch, calls: int) -> None:
    """The machine goes down in the given rename or removal."""
    left = [calls]

    def counted(original):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(*arguments)

        return call

    monkeypatch.setattr(replace.os, "rename", counted(os.rename))
    monkeypatch.setattr(replace, "remove", counted(replace.remove))


@pytest.mark.parametrize("then", ["overwrite", "resume", None])
@pytest.mark.parametrize("calls", range(24))
def test_a_crash_while_overwriting_leaves_the_old_run_or_a_clean_start(base, monkeypatch, calls, then):
    output = begun(base)
    users = put(output.root, USERS)
    before = snapshot(output.root)
    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        crash_after(patched, calls)
        prepare_output(overwriting(base))
    if calls == 0:
        assert snapshot(output.root) == before, "nothing has happened yet"
        return
    prepare_output(config(base, run={then: True} if then else {}))
    assert snapshot(output.root) == {**users, "run.json": (output.root / "run.json").read_bytes()}


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_old_checkpoints_of_the_run_are_dropped_and_no_other_folder(base):
    output = begun(base)
    put(output.root, [f"checkpoints/{name}/x" for name in ("step_00000001", "step_final", "step_00000002.bak")])
    output.make_checkpoint(6)
    output.set_latest(6)
    output.drop_old_checkpoints(keep=1)
    assert sorted(path.name for path in output.checkpoints.iterdir()) == [
        "step_00000001", "step_00000002.bak", "step_00000006", "step_final",
    ]  # fmt: skip


def test_the_named_checkpoint_is_never_dropped(base):
    output = begun(base)
    output.make_checkpoint(6)
    output.make_checkpoint(8)
    output.set_latest(2)  # the later ones were torn by a crash
    output.drop_old_checkpoints(keep=2)
    assert sorted(p.name for p in output.checkpoints.iterdir()) == ["step_00000002", "step_00000006", "step_00000008"]


def test_a_checkpoint_takes_the_place_of_a_torn_one_but_not_of_anothers(base):
    output = begun(base)
    assert list(output.make_checkpoint(4).iterdir()) == []
    put(output.root, ["checkpoints/step_00000006/mine"])
    with pytest.raises(ValueError, match=r"this run did not make it.*move it away"):
        output.make_checkpoint(6)
    assert (output.checkpoint(6) / "mine").exists()


def test_a_foreign_checkpoint_in_the_way_is_refused_before_anything_is_touched(base):
    output = begun(base)
    put(output.root, ["checkpoints/step_00000003/x"])
    prepare_output(config(base).resuming())  # which comes to no step 3
    put(output.root, ["checkpoints/step_00000006/x"])
    before = snapshot(output.root)
    for wanted in (config(base).resuming(), overwriting(base)):
        with pytest.raises(ValueError, match=r"step_00000006, which a run would overwrite.*move them away"):
            prepare_output(wanted)
    assert snapshot(output.root) == before
