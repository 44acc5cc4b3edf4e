"""`run.start_from`: a run's first weights are a folder's or another run's, in any layout, and it learns from there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.nn.functional import cross_entropy

from dense_models import QWEN3, drawn, logits, write_folder
from nsa_dist import NSAConfig
from nsa_dist.convert.dense import read_dense
from nsa_dist.convert.nsa import converted
from nsa_dist.inference.folder import load_model, save_model
from nsa_dist.train.data.samples import Samples
from nsa_dist.train.export.run import config_of, plain_model
from nsa_dist.train.export.write import write
from nsa_dist.train.files.marker import RunMarker
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.prepare import prepare_output
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens.build import Request, build
from ranks import run_ranks
from start_cases import SIZES, config, runs
from token_cases import shifted_set
from train_cases import records, write_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_texts(folder / "texts")
    model = {**QWEN3, "num_key_value_heads": 2}
    dense = read_dense(write_folder(folder / "dense", model, drawn(model)))
    save_model(converted(dense._replace(tokenizer="bytes"), NSAConfig(**SIZES), gate_logit=3.0), folder / "nsa")
    run_ranks(2, runs, folder)
    return folder


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_every_layout_begins_with_the_folders_weights(base, layout):
    first, expected = (records(base, name, "validation")[0]["loss"] for name in (layout, "CP2"))
    assert first == pytest.approx(expected, rel=1e-6)
    unmoved, _ = plain_model(base / layout)
    for (name, got), wanted in zip(unmoved.named_parameters(), load_model(base / "nsa").parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-20, msg=name)


def test_it_learns_and_goes_on_without_the_folder(base):
    losses = [record["loss"] for record in records(base, "CP2")]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    parallel = [record["loss"] for record in records(base, "moving TP2")]
    assert parallel == pytest.approx(losses[:3], rel=1e-6), "gradients of the norms are sums over ranks"


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"model": {"norm_eps": 1e-5}}, r"norm_eps: .*nsa has 1e-06, the run 1e-05\ngive the values of .*config.json"),
        ({"nsa": {"window_len": 40}}, r"nsa: .*window_len=20.*window_len=40"),
        ({"model": {"attention": "dense"}}, "take attention=nsa, or leave start_from out"),
        (
            {"run": {"start_from": "nowhere"}},
            "give a run's output_dir, or a folder that nsa-dist convert or nsa-dist export",
        ),
        ({"run": {"start_from": "RUNS/other"}}, "set resume=true instead to go on with the run"),
        (
            {"run": {"start_from": "RUNS/CP2"}, "nsa": {"window_len": 40}},
            r"give the values of .*CP2/run.json, under identity",
        ),
        ({"run": {"start_from": "RUNS/dense"}}, r"model.attention=dense, and the run nsa.*take attention=dense"),
        ({"run": {"start_from": "RUNS/CP2"}, "model": {"attention": ["nsa", "dense"]}}, "take attention=nsa"),
    ],
)
def test_another_model_is_refused_before_anything_starts(base, change, remedy):
    if (place := change.get("run", {}).get("start_from", "")).startswith("RUNS/"):
        change = {**change, "run": {"start_from": base / place.removeprefix("RUNS/")}}
    with pytest.raises(Refused, match=f"(?s){remedy}"):
        prepare_output(config(base, "other", **change))
    assert not (base / "other").exists()


def test_another_vocabulary_is_refused(base):
    shutil.copytree(base / "nsa", base / "words")
    path = base / "words/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": "huggingface"}))
    with pytest.raises(Refused, match=r"build data.tokens with the model's own tokenizer"):
        prepare_output(config(base, "other", run={"start_from": base / "words"}))


@pytest.mark.parametrize(
    ("name", "source", "tolerance"),
    [("of CP2", "CP2", 1e-6), ("bf16 of CP2", "CP2", 1e-2), ("of dense", "dense", 1e-6)],
)
def test_a_run_begins_with_the_weights_that_another_ended_with(base, name, source, tolerance):
    first, last = (records(base, run, "validation")[which]["loss"] for run, which in ((name, 0), (source, -1)))
    assert first == pytest.approx(last, rel=tolerance)


def test_other_turns_and_longer_samples_are_other_losses(base):
    last = {run: records(base, run, "validation")[-1]["loss"] for run in ("CP2", "dense")}
    slower, longer = (records(base, run, "validation")[0]["loss"] for run in ("slower turns", "longer"))
    assert abs(slower / last["CP2"] - 1) > 1e-6
    assert 1e-6 < abs(longer / last["dense"] - 1) < 0.1


def test_what_a_run_began_with_is_said(base):
    told = (base / "told.txt").read_text()
    assert f"the first weights are those of step 4 of {base / 'CP2'}" in told
    assert "rotary_base" not in told
    assert (
        f"rotary_base is 10000000.0, and {base / 'CP2'} was trained with 1000000.0"
        in (base / "told of turns.txt").read_text()
    )


def test_another_tokenizer_is_refused(base, tmp_path, monkeypatch):
    """Of as many rows, padded: nothing else would tell."""
    for name, size in (("theirs", 300), ("ours", 301)):
        shifted_set(monkeypatch, tmp_path / name, 0, vocab_size=size)
    shutil.copytree(base / "CP2", tmp_path / "run")
    marker = RunMarker.read(base / "CP2")
    marker.changed(identity={**marker.identity, "data.tokens": str(tmp_path / "theirs")}).write(tmp_path / "run")

    def check_of(tokens: str) -> None:
        data = {"folder": None, "tokens": str(tmp_path / tokens)}
        prepare_output(config(base, f"of {tokens}", run={"start_from": tmp_path / "run"}, data=data))

    check_of("theirs")
    with pytest.raises(Refused, match=r"'size': 300.*'size': 301.*build data.tokens with the model's own tokenizer"):
        check_of("ours")


@pytest.mark.parametrize("source", ["a run", "a folder with a tokenizer"])
def test_bytes_are_bytes_in_a_token_set_too(base, tmp_path, source):
    """Which has no tokenizer's file, where an exported folder of bytes does."""
    build(Request([base / "texts"], tmp_path / "tokens"))
    folder = base / "CP2" if source == "a run" else base / "nsa"
    assert source == "a run" or (folder / "tokenizer.json").is_file()
    data = {"folder": None, "tokens": str(tmp_path / "tokens")}
    prepare_output(config(base, f"bytes of {folder.name}", run={"start_from": folder}, data=data))


def losses_of(folder: Path, of_run: Path, samples: int) -> float:
    """Of a dense folder over the first validation samples of a run, by the mathematics alone."""
    raw, weights = json.loads((folder / "config.json").read_text()), read_dense(folder).weights
    run = config_of(OutputDir(of_run)).run
    validation = Samples(IndexedDataset(str(of_run / "data/validation")), run.sequence_length, run.seed)
    found = [
        cross_entropy(logits(raw, weights, x["tokens"]), x["labels"])
        for x in map(validation.__getitem__, range(samples))
    ]
    return torch.stack(found).mean().item()


def test_a_dense_run_is_exported_as_what_it_is(base, tmp_path):
    written = write(base / "dense", tmp_path / "qwen")
    assert (written.kind, written.step) == ("a dense model", 4)
    dense = read_dense(tmp_path / "qwen")
    assert (dense.tokenizer, dense.sequence_length, dense.not_read) == ("bytes", 256, ("architectures", "bos_token_id"))
    with pytest.raises(ValueError, match=r"model_type is 'qwen3'.*make one of a Llama or Qwen 3 with nsa-dist convert"):
        load_model(tmp_path / "qwen")
    expected = records(base, "dense", "validation")[-1]["loss"]
    assert losses_of(tmp_path / "qwen", base / "dense", samples=4) == pytest.approx(expected, rel=1e-5)


def test_a_dense_run_goes_on_with_nsa(base, tmp_path):
    """Exported, converted and begun with: the logits are the dense run's while all blocks are selected."""
    write(base / "dense", tmp_path / "qwen")
    model = converted(read_dense(tmp_path / "qwen"), NSAConfig(**SIZES))
    save_model(model, tmp_path / "nsa")
    tokens = torch.arange(64) * 37 % 251
    expected = logits(
        json.loads((tmp_path / "qwen/config.json").read_text()), read_dense(tmp_path / "qwen").weights, tokens
    )
    torch.testing.assert_close(model(tokens).double(), expected, rtol=0, atol=1e-4)
    prepare_output(config(base, "from dense", run={"start_from": tmp_path / "nsa"}))


@pytest.mark.parametrize(
    ("key", "value"), [("model.qk_norm", "l2"), ("nsa.rotary_percent", 0.5), ("nsa.no_rope_freq", 2)]
)
def test_what_no_folder_of_hugging_face_computes_is_not_exported(base, tmp_path, key, value):
    shutil.copytree(base / "dense", tmp_path / "run")
    marker = RunMarker.read(base / "dense")
    marker.changed(identity={**marker.identity, key: value}).write(tmp_path / "run")
    with pytest.raises(Refused, match=f"{key}={value}.*evaluate this run by its metrics.jsonl"):
        write(tmp_path / "run", tmp_path / "to")
    assert not (tmp_path / "to").exists()
