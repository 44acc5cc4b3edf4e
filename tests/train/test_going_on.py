"""What a run may go on as, and with which texts. No process group, no step."""

import os
from pathlib import Path

import pytest

from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.files.output import MADE, OutputDir
from nsa_dist.train.identity import FIXED, FREE
from nsa_dist.train.prepare import check_output, note_settings, prepare_output
from prepare_cases import begun, config, put, snapshot
from train_cases import write_texts


@pytest.fixture
def base(tmp_path) -> Path:
    write_texts(tmp_path / "texts")
    return tmp_path


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
    "data.task_lengths": [128], "data.documents": "packed", "model.num_experts": 4, "model.moe_layer_freq": [0, 1],
    "model.moe_ffn_hidden_size": 16, "model.moe_shared_expert_intermediate_size": 16, "model.moe_router_topk": 3,
    "model.moe_router_pre_softmax": True, "model.mtp_num_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize("key", FIXED)
def test_what_may_not_change_is_refused_with_both_values(base, key):
    output = begun(base)
    before = snapshot(output.root)
    section, name = key.split(".")
    value = base / "nowhere" if key in ("data.folder", "data.tokens") else OTHER[key]
    beside = {"data.tokens": {"folder": None}, "data.task_lengths": {"tasks": {"copy": 0.5}}}.get(key, {})
    beside |= {"num_experts": 4} if name.startswith("moe_") else {}
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


@pytest.mark.parametrize(("key", "value"), [("num_experts", 4), ("mtp_num_layers", 1)])
def test_a_run_from_before_there_were_such_layers_goes_on_without(base, key, value):
    output = begun(base)
    marker = output.marker()
    later = ("model.moe_", "model.num_experts", "model.mtp_")
    older = {name: held for name, held in marker.identity.items() if not name.startswith(later)}
    assert len(older) == len(marker.identity) - 7
    marker.changed(identity=older).write(output.root)
    with pytest.raises(
        ValueError, match=rf"model\.{key}: the run has null, given is {value}; the checkpoint's weights"
    ):
        prepare_output(config(base, model={key: value}).resuming())
    prepare_output(config(base).resuming())


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
