"""`run.start_from`: a run's first weights are those of a folder, whatever its layout, and it learns from there."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dense_models import QWEN3, drawn, write_folder
from nsa_dist import NSAConfig
from nsa_dist.convert.dense import read_dense
from nsa_dist.convert.nsa import converted
from nsa_dist.inference.folder import load_model, save_model
from nsa_dist.train.export.run import plain_model
from nsa_dist.train.prepare import prepare_output
from nsa_dist.train.refused import Refused
from ranks import run_ranks
from start_cases import SIZES, config, runs
from train_cases import records, write_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_texts(folder / "texts")
    model = {**QWEN3, "num_key_value_heads": 2}
    dense = read_dense(write_folder(folder / "dense", model, drawn(model)))
    save_model(converted(dense, NSAConfig(**SIZES), gate_logit=3.0, tokenizer="bytes"), folder / "nsa")
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
        ({"run": {"start_from": "nowhere"}}, "give a folder that nsa-dist convert or nsa-dist export wrote"),
    ],
)
def test_another_model_is_refused_before_anything_starts(base, change, remedy):
    with pytest.raises(Refused, match=f"(?s){remedy}"):
        prepare_output(config(base, "other", **change))
    assert not (base / "other").exists()


def test_another_vocabulary_is_refused(base):
    shutil.copytree(base / "nsa", base / "words")
    path = base / "words/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": "huggingface"}))
    with pytest.raises(Refused, match=r"build data.tokens with the model's own tokenizer"):
        prepare_output(config(base, "other", run={"start_from": base / "words"}))
