"""Who may start in a folder, what is removed there, and what a run may go on as. No process group, no step."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.files import replace
from nsa_dist.train.files.output import MADE, OutputDir
from nsa_dist.train.identity import FIXED, FREE
from nsa_dist.train.prepare import check_output, note_settings, prepare_output
from train_cases import small_config, write_texts


@pytest.fixture
def base(tmp_path) -> Path:
    write_texts(tmp_path / "texts")
    return tmp_path


def config(base: Path, **sections) -> TrainConfig:
    return small_config(base, "run", **sections)


def begun(base: Path, **sections) -> OutputDir:
    """A run that has packed its texts and has two checkpoints, the pictures and some events."""
    wanted = config(base, **sections)
    prepare_output(wanted)
    output = OutputDir(wanted.run.output_dir)
    digest = write_corpus(wanted.data, output.data)
    output.marker().changed(corpus=digest).write(output.root)
    for step in (2, 4):
        (output.make_checkpoint(step) / "weights").write_text("w")
        output.set_latest(step)
    output.metrics.write_text('{"kind": "train", "step": 4}\n')
    output.tensorboard.mkdir()
    (output.tensorboard / "events.out.tfevents.1").write_text("e")
    (output.root / "loss.png").write_text("p")
    return output


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below `folder`, links as where they point."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def overwriting(base: Path, **sections) -> TrainConfig:
    return config(base, **{**sections, "run": {**sections.get("run", {}), "overwrite": True}})


# --- what is removed ------------------------------------------------------------------------------------------------

USERS = ["notes.txt", "data/mine/a.txt", "data/train.bin.bak", "checkpoints/step_00000002-kept/weights", "logs/a.log",
         "checkpoints/step_final/weights", "tensorboard/readme", "ray/results.csv", "checkpoints/step_3"]  # fmt: skip


def put(folder: Path, names: list[str]) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the user's {name}")
    return {name: (folder / name).read_bytes() for name in names}


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


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_run_is_neither_mixed_nor_replaced_unasked(base):
    output = begun(base)
    before = snapshot(output.root)
    with pytest.raises(ValueError, match=r"set resume=true to go on with it, overwrite=true to replace it, or another"):
        prepare_output(config(base))
    prepare_output(config(base).resuming())
    assert snapshot(output.root) == before


def test_contradicting_instructions_are_refused(base):
    with pytest.raises(ValueError, match=r"not both can be done; leave one of them out"):
        config(base, run={"resume": True, "overwrite": True})


OTHER: dict[str, object] = {
    "run.sequence_length": 512, "run.seed": 7, "run.dtype": "bf16", "model.attention": "dense",
    "model.num_layers": 4, "model.hidden_size": 64,
    "model.num_attention_heads": 8, "model.num_query_groups": 4, "model.head_dim": 16, "model.ffn_hidden_size": 96,
    "model.tie_embeddings": True, "model.init_std": 0.5, "model.embedding_init_std": 0.5, "nsa.cmp_block_len": 16,
    "nsa.cmp_stride": 8, "nsa.slc_block_len": 32, "nsa.num_slc_blocks": 5, "nsa.num_init_blocks": 0,
    "nsa.num_local_blocks": 1, "nsa.window_len": 24, "nsa.shared_kv": True, "nsa.compression": "mean",
    "nsa.compress_before_rope": False, "nsa.rotary_base": 500.0, "nsa.rotary_percent": 0.5,
    "nsa.rope_scaling": {"rope_type": "linear", "factor": 2}, "nsa.no_rope_freq": 2, "nsa.gate_bias": True,
    "model.qk_norm": "rms", "model.norm_eps": 1e-6, "data.folder": "elsewhere", "data.pattern": "*0.txt",
    "data.validation_fraction": 0.5, "data.max_file_bytes": 10, "data.tasks": {"recall": 0.5},
    "data.task_lengths": [128], "data.documents": "packed",
}  # fmt: skip


@pytest.mark.parametrize("key", FIXED)
def test_what_may_not_change_is_refused_with_both_values(base, key):
    output = begun(base)
    before = snapshot(output.root)
    section, name = key.split(".")
    value = base / "nowhere" if key in ("data.folder", "data.tokens") else OTHER[key]
    beside = {"data.tokens": {"folder": None}, "data.task_lengths": {"tasks": {"copy": 0.5}}}.get(key, {})
    changed = config(base, **{section: {**beside, name: value}}).resuming()
    was, now = (getattr(getattr(c, section), name) for c in (config(base), changed))
    with pytest.raises(ValueError, match=r"another run under its name.*(?s:.)*give the old values") as caught:
        prepare_output(changed)
    shown = ["null" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in (was, now)]
    assert f"{key}: the run has {shown[0]}, given is {shown[1]}; {FIXED[key]}" in str(caught.value)
    assert snapshot(output.root) == before


def test_a_run_from_before_documents_were_kept_apart_goes_on_as_it_was(base):
    output = begun(base)
    marker = output.marker()
    older = {key: value for key, value in marker.identity.items() if key != "data.documents"}
    assert len(older) == len(marker.identity) - 1
    marker.changed(identity=older).write(output.root)
    with pytest.raises(ValueError, match=r"data\.documents: the run has whole, given is packed"):
        prepare_output(config(base, data={"documents": "packed"}).resuming())
    prepare_output(config(base, data={"documents": "whole"}).resuming())


def test_all_differences_are_in_one_message(base):
    begun(base)
    with pytest.raises(ValueError, match=r"run\.seed(?s:.)*nsa\.window_len"):
        prepare_output(config(base, run={"seed": 7}, nsa={"window_len": 24}).resuming())


def test_what_may_change_does_and_is_written_down_once(base):
    output = begun(base)
    other = config(base, run={"steps": 9, "global_batch_size": 8}, parallel={"layout": "contiguous"},
                   optimizer={"lr": 2e-3, "min_lr": 1e-5}).resuming()  # fmt: skip
    prepare_output(other)
    expected = {"run.steps": [6, 9], "run.global_batch_size": [4, 8], "parallel.layout": ["zigzag", "contiguous"],
                "optimizer.lr": [3e-3, 2e-3], "optimizer.min_lr": [3e-4, 1e-5]}  # fmt: skip
    assert note_settings(output, other) == expected
    assert note_settings(output, other) == {}


def test_every_key_is_decided_about_once():
    assert not FIXED.keys() & FREE


def test_steps_that_were_made_are_not_taken_back(base):
    begun(base)
    with pytest.raises(ValueError, match=r"steps=3 is below the 4 steps.*take steps=4 or more"):
        prepare_output(config(base, run={"steps": 3}).resuming())
    prepare_output(config(base, run={"steps": 4}).resuming())


def test_a_named_checkpoint_that_is_gone_is_refused(base):
    output = begun(base)
    os.rename(output.checkpoint(4), base / "gone")
    with pytest.raises(ValueError, match=r"which is not there.*put it back"):
        prepare_output(config(base).resuming())


def test_a_run_that_never_ran_may_begin_again_as_another(base):
    first, output = config(base, run={"seed": 1}), OutputDir(base / "run")
    prepare_output(first, [*MADE, "logs/rank-*.log"])
    digest = write_corpus(first.data, output.data)
    output.marker().changed(corpus=digest).write(output.root)
    put(output.root, ["logs/rank-0000.log", "data/mine"])
    prepare_output(config(base, run={"seed": 1}))
    assert output.marker().corpus == digest
    prepare_output(config(base, run={"seed": 2}))
    prepare_output(config(base, data={"pattern": "*[0-5].txt"}, run={"seed": 3}).resuming())
    marker = output.marker()
    assert (marker.identity["run.seed"], marker.identity["data.pattern"]) == (3, "*[0-5].txt")
    assert (marker.corpus, [path.name for path in output.data.iterdir()]) == ("", ["mine"])
    assert (output.root / "logs/rank-0000.log").exists()


# --- the corpus -----------------------------------------------------------------------------------------------------


def test_the_texts_may_move_but_not_change(base):
    output = begun(base)
    os.rename(base / "texts", base / "moved")
    prepare_output(config(base).resuming())  # the same name, and the packed texts are here
    moved = config(base, data={"folder": base / "moved"}).resuming()
    prepare_output(moved)
    assert note_settings(output, moved) == {"data.folder": [str(base / "texts"), str(base / "moved")]}
    (base / "moved/3.txt").write_text("another text")
    prepare_output(moved)
    os.rename(base / "moved", base / "again")
    with pytest.raises(ValueError, match=r"data\.folder: the run has .*moved, given is .*again"):
        prepare_output(config(base, data={"folder": base / "again"}).resuming())


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "validation.idx"])
def test_a_packed_corpus_that_changed_is_refused(base, name):
    output = begun(base)
    path = output.data / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name}.* not as they were written.*put the files back, or remove"):
        prepare_output(config(base).resuming())
    path.unlink()
    with pytest.raises(ValueError, match=r"does not hold the whole corpus.*put the files back, or remove"):
        prepare_output(config(base).resuming())


def test_another_corpus_in_its_place_is_refused(base):
    output = begun(base)
    for path in output.data.iterdir():
        path.unlink()
    write_texts(base / "others", num_files=6)
    write_corpus(config(base, data={"folder": base / "others"}).data, output.data)
    with pytest.raises(ValueError, match=r"the run was begun with .*put the files back, or remove"):
        prepare_output(config(base).resuming())


def test_a_corpus_that_is_gone_is_packed_again_if_it_is_the_same(base):
    output = begun(base)
    digest = output.marker().corpus
    for path in output.data.iterdir():
        path.unlink()
    prepare_output(config(base).resuming())
    assert write_corpus(config(base).data, output.data, digest) == digest
    for path in output.data.iterdir():
        path.unlink()
    (base / "texts/3.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"has other texts.*put one of them back, or start a new run"):
        prepare_output(config(base).resuming())
    with pytest.raises(ValueError, match=r"has other texts|holds other texts"):
        write_corpus(config(base).data, output.data, digest)


def test_a_new_run_needs_its_folder_of_texts(base):
    with pytest.raises(ValueError, match=r"nowhere is not a folder.*name another"):
        check_output(config(base, data={"folder": base / "nowhere"}))
    assert not (base / "run").exists()
