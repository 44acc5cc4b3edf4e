"""Manifests, and the newest intact checkpoint: files of a few kilobytes, one process of a group of one, no training."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from damages import OF_A_FILE, contents, some_damage, swap, unhurt, zero_page
from nsa_dist.cp.comm import Comm
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.files import manifest, output
from nsa_dist.train.files.candidates import name_of
from nsa_dist.train.files.intact import Intact, newest_intact
from nsa_dist.train.files.manifest import DamagedError, Entry, Manifest, written_by
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.prepare import check_output, prepare_output
from nsa_dist.train.world import World
from train_cases import small_config, write_texts

STEPS = (2, 4, 6)
FILES = (".metadata", "metadata.json", "common.pt", "__0_0.distcp", "__0_1.distcp")
NEWEST, BEFORE = name_of(6), name_of(4)
REMEDY = r"put these files back from a copy, or start a new run in another output_dir \(in this one: overwrite=true\)"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    meet = tmp_path_factory.mktemp("meet") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield World(torch.device("cpu"), rank=0, size=1, dp_rank=0, dp_size=1, cp=Comm())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    """A run with three checkpoints, of which each file holds other bytes."""
    base = tmp_path_factory.mktemp("base")
    write_texts(base / "texts")
    prepare_output(small_config(base, "run"))
    made = OutputDir(base / "run")
    made.metrics.write_text("")
    for step in STEPS:
        save(made, step)
    return made.root


@pytest.fixture
def run(made_once, tmp_path) -> OutputDir:
    shutil.copytree(made_once, tmp_path / "run")
    return OutputDir(tmp_path / "run")


def config(made: OutputDir, **run) -> TrainConfig:
    texts = made.marker().identity["data.folder"]
    return small_config(made.root.parent, made.root.name, data={"folder": texts}, run=run)


def fill(folder: Path, names=FILES) -> None:
    draw = random.Random(folder.name)
    for name in names:
        (folder / name).write_bytes(draw.randbytes(10_000))


def save(made: OutputDir, step: int, names=FILES) -> None:
    folder = made.make_checkpoint(step)
    fill(folder, names)
    made.complete(Manifest(made.marker().run_id, step, 4 * step, written_by(0, 1, folder)))


def snapshot(made: OutputDir) -> dict[str, bytes]:
    files = (path for path in made.root.rglob("*") if path.is_file())
    return {path.relative_to(made.root).as_posix(): path.read_bytes() for path in files}


def without_manifests(made: OutputDir) -> None:
    """The run as a version without manifests leaves it."""
    for step in STEPS:
        (made.checkpoint(step) / manifest.NAME).unlink()
    made.marker().changed(manifests=False).write(made.root)


def went_on_from(made: OutputDir, world: World, step: int) -> str:
    """All that was said. The run goes on from `step`, and `latest.json` says so."""
    intact = newest_intact(made, world)
    assert intact.path == made.checkpoint(step)
    assert json.loads(made.latest.read_text()) == {"step": step, "checkpoint": name_of(step)}
    check_output(config(made, steps=10).resuming())
    assert newest_intact(made, world).path == made.checkpoint(step), "it was left as a run to go on with"
    return "\n".join(intact.notices)


# --- what a manifest says -------------------------------------------------------------------------------------------


def test_a_manifest_names_every_file_with_its_size_and_digest(run):
    held = json.loads((run.checkpoint(6) / manifest.NAME).read_text())
    assert (held["step"], held["samples"], held["run_id"]) == (6, 24, run.marker().run_id)
    files = {name: text for name, text in contents(run.checkpoint(6)).items() if name != manifest.NAME}
    assert files.keys() == set(FILES)
    assert held["files"] == {
        name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in files.items()
    }


def test_each_rank_takes_the_digests_of_what_it_wrote(tmp_path):
    names = [*FILES, "__1_0.distcp", "__12_0.distcp", "__x_0.distcp"]
    fill(tmp_path, names)
    shares = [written_by(rank, 13, tmp_path).keys() for rank in range(13)]
    assert shares[1] == {"__1_0.distcp"}
    assert shares[12] == {"__12_0.distcp"}
    assert sorted(name for share in shares for name in share) == sorted(names)


def test_a_checkpoint_counts_only_with_its_manifest(run, world, monkeypatch):
    """Whenever the process dies in a save, the checkpoint before it or the whole new one is taken."""
    fill(run.make_checkpoint(8))

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write_atomically", dies)
        with pytest.raises(KeyboardInterrupt):
            run.complete(Manifest(run.marker().run_id, 8, 32, written_by(0, 1, run.checkpoint(8))))
    said = went_on_from(run, world, 6)
    assert said == f"{name_of(8)} is not complete (it has no manifest.json), and is passed over"
    with monkeypatch.context() as patched:
        patched.setattr(OutputDir, "set_latest", dies)
        with pytest.raises(KeyboardInterrupt):
            save(run, 8)
    said = went_on_from(run, world, 8)
    assert said == "latest.json names step 6, and the checkpoint of step 8 is newer and complete"


def test_nothing_is_said_of_a_run_that_is_as_it_should_be(run, world):
    before = snapshot(run)
    intact = newest_intact(run, world)
    assert (intact.path, intact.notices) == (run.checkpoint(6), ())
    assert intact.record() == {
        "checkpoint": "step_00000006", "verified_bytes": 50_000, "verified_s": intact.seconds, "notices": [],
    }  # fmt: skip
    assert intact.seconds > 0
    assert snapshot(run) == before


def test_a_run_without_a_checkpoint_begins_at_step_0(tmp_path, world):
    write_texts(tmp_path / "texts")
    prepare_output(small_config(tmp_path, "run"))
    made = OutputDir(tmp_path / "run")
    assert newest_intact(made, world) == Intact()
    fill(made.make_checkpoint(2))
    assert newest_intact(made, world).notices == (
        f"{name_of(2)} is not complete (it has no manifest.json), and is passed over",
    )
    save(made, 2)
    assert newest_intact(made, world).path == made.checkpoint(2)


# --- damages of the newest checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
@pytest.mark.parametrize("damage", OF_A_FILE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_kept_and_the_one_before_it_taken(run, world, name, damage):
    path = run.checkpoint(6) / name
    damage(path, random.Random(0))
    damaged = contents(run.checkpoint(6))
    before = contents(run.checkpoint(4))
    said = went_on_from(run, world, 4)
    assert said.startswith(f"{NEWEST} is damaged ({name} ")
    assert said.endswith(f"is kept as {NEWEST}.damaged; the run goes on from step 4")
    assert contents(run.root / f"{NEWEST}.damaged") == damaged
    assert contents(run.checkpoint(4)) == before


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing folder", "its folder is missing"),
        ("swapped folders", "manifest.json is of step 4"),
        ("swapped manifests", "manifest.json is of step 4"),
        ("swapped files", r"__0_1.distcp is not as it was written (its SHA-256 differs)"),
        ("of another run", "manifest.json is of another run (f00"),
        ("a folder for a file", "__0_0.distcp is not a file"),
        ("a pipe for a file", "__0_0.distcp is not a file"),
        ("a name elsewhere", "manifest.json names '../../texts/0.txt', which is no file of a checkpoint"),
        ("an unnamed pickle", "manifest.json does not name .metadata"),
        ("another pickle", "common.pt is there, and manifest.json does not name it"),
        ("another format", "manifest.json cannot be read (ValueError: format 'nsa-dist checkpoint', version 1"),
    ],
)
def test_other_damages_of_the_newest(run, world, what, said):
    newest = run.checkpoint(6)
    files = dict(written_by(0, 1, newest))
    del files[manifest.NAME]
    run_id = run.marker().run_id
    match what:
        case "missing folder":
            shutil.rmtree(newest)
        case "swapped folders":
            swap(newest, run.checkpoint(4))
        case "swapped manifests":
            (newest / manifest.NAME).write_bytes((run.checkpoint(4) / manifest.NAME).read_bytes())
        case "swapped files":
            (newest / "__0_1.distcp").write_bytes((run.checkpoint(4) / "__0_1.distcp").read_bytes())
        case "of another run":
            Manifest("f00", 6, 24, files).write(newest)
        case "a folder for a file":
            (newest / "__0_0.distcp").unlink()
            (newest / "__0_0.distcp").mkdir()
        case "a pipe for a file":
            (newest / "__0_0.distcp").unlink()
            os.mkfifo(newest / "__0_0.distcp")
        case "a name elsewhere":
            Manifest(run_id, 6, 24, {**files, "../../texts/0.txt": Entry(3, "")}).write(newest)
        case "an unnamed pickle" | "another pickle":
            del files[".metadata" if what == "an unnamed pickle" else "common.pt"]
            Manifest(run_id, 6, 24, files).write(newest)
        case "another format":
            text = (newest / manifest.NAME).read_text()
            (newest / manifest.NAME).write_text(text.replace('"version": 1', '"version": 2'))
    expected = 2 if what == "swapped folders" else 4
    assert f"{NEWEST} is damaged ({said}" in went_on_from(run, world, expected)


def test_more_files_hurt_nobody(run, world):
    (run.checkpoint(6) / "notes.txt").write_text("the best so far")
    (run.checkpoint(6) / "__7_0.distcp").write_text("")
    assert went_on_from(run, world, 6) == ""


def test_what_was_kept_stays_until_the_run_is_overwritten(run, world):
    theirs = run.root / f"{NEWEST}.damaged"
    theirs.mkdir()
    (theirs / "mine").write_text("the user's")
    (run.checkpoint(6) / "common.pt").unlink()
    assert f"kept as {NEWEST}.damaged-2" in went_on_from(run, world, 4)
    save(run, 6)
    (run.checkpoint(6) / "common.pt").unlink()
    assert f"kept as {NEWEST}.damaged-3" in went_on_from(run, world, 4)
    for step in (6, 8):
        save(run, step)
        run.drop_old_checkpoints(keep=1)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "step_00000006.damaged", "step_00000006.damaged-2", "step_00000006.damaged-3", "step_00000008",
    ]  # fmt: skip
    prepare_output(config(run, overwrite=True))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [theirs.name]
    assert (theirs / "mine").read_text() == "the user's"


def test_a_repaired_checkpoint_can_be_put_back(run, world):
    path = run.checkpoint(6) / "common.pt"
    text = path.read_bytes()
    path.write_bytes(text[:-1])
    went_on_from(run, world, 4)
    (run.root / f"{NEWEST}.damaged" / "common.pt").write_bytes(text)
    (run.root / f"{NEWEST}.damaged").rename(run.checkpoint(6))
    assert "names step 4, and the checkpoint of step 6 is newer" in went_on_from(run, world, 6)


def test_older_damages_are_not_looked_for(run, world):
    """They would cost a start the time to read them, and nothing depends on them."""
    zero_page(run.checkpoint(4) / "common.pt", random.Random(0))
    assert went_on_from(run, world, 6) == ""


# --- latest.json ----------------------------------------------------------------------------------------------------

SPOILED = {
    '{"step": 6, "check': r"latest.json cannot be read (JSONDecodeError: Unterminated string",
    '{"step": 6, "\x00\x00"}': "latest.json cannot be read (JSONDecodeError: Invalid control character",
    "": "latest.json cannot be read (JSONDecodeError",
    "[" * 100_000: "latest.json cannot be read (RecursionError",
    '{"step": 6}': "latest.json does not say both step and checkpoint",
    '{"step": true, "checkpoint": "checkpoints/step_00000001"}': "latest.json does not say both step and checkpoint",
    "[6]": "latest.json does not say both step and checkpoint",
    '{"step": 6, "checkpoint": "checkpoints/../../elsewhere"}': "which is no checkpoint of this run",
    '{"step": 6, "checkpoint": "/tmp"}': "which is no checkpoint of this run",
    '{"step": 6, "checkpoint": "checkpoints/step_00000004"}': "which is no checkpoint of this run",
    '{"step": -6, "checkpoint": "checkpoints/step_-0000006"}': "which is no checkpoint of this run",
    '{"step": 4, "checkpoint": "checkpoints/step_00000004"}': "names step 4, and the checkpoint of step 6 is newer",
    '{"step": 8, "checkpoint": "checkpoints/step_00000008"}': f"{name_of(8)} is damaged (its folder is missing)",
    None: "latest.json is missing; the folders say that step 6 is the newest checkpoint",
}  # fmt: skip


@pytest.mark.parametrize("text", SPOILED, ids=lambda text: str(text)[:30])
def test_where_latest_json_is_wrong_the_folders_decide_and_it_is_said(run, world, text):
    run.latest.unlink()
    if text is not None:
        run.latest.write_text(text)
    said = went_on_from(run, world, 6)
    assert SPOILED[text] in said
    assert "\n" not in said


def test_a_folder_of_anothers_is_not_taken(run, world):
    """`run.json` names what the run made; a stranger's folder is neither loaded nor renamed."""
    shutil.copytree(run.checkpoint(6), run.checkpoint(8))
    run.set_latest(8)
    intact = newest_intact(run, world)
    assert intact.path == run.checkpoint(6)
    assert "run.json does not say that this run made it" in intact.notices[0]
    assert run.checkpoint(8).is_dir()


# --- what cannot be survived ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", OF_A_FILE, ids=lambda damage: damage.__name__)
def test_without_an_intact_checkpoint_all_files_are_named_and_nothing_is_changed(run, world, damage):
    names = dict(zip(STEPS, (".metadata", "common.pt", "__0_1.distcp"), strict=True))
    for step, name in names.items():
        damage(run.checkpoint(step) / name, random.Random(step))
    before = snapshot(run)
    with pytest.raises(ValueError, match=rf"no checkpoint of the run .* is as it was written(?s:.*){REMEDY}") as caught:
        newest_intact(run, world)
    for step, name in names.items():
        assert f"  {name_of(step)}: {name} " in str(caught.value)
    assert snapshot(run) == before


def test_what_a_look_shows_is_refused_before_any_process_starts(run):
    for step in STEPS:
        (run.checkpoint(step) / ".metadata").unlink()
    with pytest.raises(ValueError, match=rf"{NEWEST}: \.metadata is missing\n(?s:.*){REMEDY}"):
        check_output(config(run).resuming())


@pytest.mark.parametrize("latest", ["kept", "lost", "cut"])
def test_checkpoints_that_are_gone_do_not_send_a_run_back_to_step_0(run, world, latest):
    shutil.rmtree(run.checkpoints)
    if latest == "lost":
        run.latest.unlink()
    if latest == "cut":
        run.latest.write_text("{")
    with pytest.raises(ValueError, match=rf"{NEWEST}: its folder is missing(?s:.*){REMEDY}"):
        newest_intact(run, world)


# --- checkpoints of versions without manifests ----------------------------------------------------------------------


def test_a_checkpoint_of_a_version_without_manifests_is_taken_and_that_is_said(run, world):
    without_manifests(run)
    intact = newest_intact(run, world)
    assert intact.path == run.checkpoint(6)
    assert "nothing tells whether its files are as they were written: it is loaded all the same" in intact.notices[0]
    save(run, 8)
    (run.checkpoint(8) / "common.pt").unlink()
    with pytest.raises(
        ValueError, match=rf"common\.pt is missing\n.*{NEWEST}: manifest\.json is missing(?s:.*){REMEDY}"
    ):
        newest_intact(run, world)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("{", 'write the newest one into it, as {"step": 4,'), ('{"step": 6}', "write the newest one into it, as "),
     ('{"step": 8, "checkpoint": "checkpoints/step_00000008"}', "put it back, or write the newest")],
)  # fmt: skip
def test_without_manifests_nothing_replaces_latest_json(run, world, text, remedy):
    without_manifests(run)
    run.latest.write_text(text)
    for refused in (
        lambda: newest_intact(run, world),
        lambda: check_output(config(run).resuming()),
    ):
        with pytest.raises(ValueError, match=r"latest\.json") as caught:
            refused()
        assert remedy in str(caught.value)


def test_without_manifests_what_is_missing_at_sight_is_named(run, world):
    without_manifests(run)
    (run.checkpoint(6) / ".metadata").unlink()
    with pytest.raises(ValueError, match=rf"{NEWEST}: \.metadata missing(?s:.*){REMEDY}"):
        newest_intact(run, world)


# --- keeping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2])
def test_torn_checkpoints_take_no_complete_ones_place(run, keep):
    for step in (8, 10):
        fill(run.make_checkpoint(step))
    run.drop_old_checkpoints(keep)
    left = [int(path.name[-8:]) for path in run.checkpoints.iterdir()]
    assert sorted(left) == sorted({*(8, 10)[-keep:], *STEPS[-keep:]})


def test_a_failing_manifest_is_no_manifest(run):
    (run.checkpoint(6) / manifest.NAME).write_text("[" * 100_000)
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be read \(RecursionError"):
        Manifest.read(run.checkpoint(6))
    assert output.RunMarker.read(run.root).manifests


# --- drawn damages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_drawn_damages_are_survived_or_refused_and_never_silent(run, world, seed):
    draw = random.Random(seed)
    before = {step: contents(run.checkpoint(step)) for step in STEPS}
    latest = run.latest.read_bytes()
    done = [some_damage(run.root, draw) for _ in range(draw.choice([1, 1, 1, 2, 3, 6]))]
    whole = unhurt(run.root, before)
    hurt = {step: _hurt_files(run.checkpoint(step), files) for step, files in before.items() if step not in whole}
    changed = not run.latest.exists() or run.latest.read_bytes() != latest
    if not whole:
        with pytest.raises(ValueError, match=REMEDY) as caught:
            newest_intact(run, world)
        said, found = str(caught.value), 0
        changed = False  # of no consequence
    else:
        intact = newest_intact(run, world)
        found = int(intact.path.name[-8:])
        assert found == whole[0], done
        said = "\n".join(intact.notices)
        assert said or (found == STEPS[-1] and not changed), done
    assert "latest.json" in said or not changed or json.loads(run.latest.read_text())["step"] == found, done
    for step, names in hurt.items():
        if step > found:
            assert name_of(step) in said, done
            assert any(name in said for name in names), (done, said, names)


def _hurt_files(folder: Path, before: dict[str, bytes]) -> list[str]:
    """The files that are not as before; for a folder that is gone what is said of it."""
    if not folder.is_dir():
        return ["its folder is missing", "is not complete"]
    now = contents(folder)
    return [name for name, text in before.items() if now.get(name) != text]
