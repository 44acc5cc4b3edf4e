"""Runs of dense models and of both kinds of layers: every layout, what is recorded of them, and what refuses them."""

from pathlib import Path

import pytest

from dense_run_cases import RUNS, STEPS, alone, config, pair
from nsa_dist.planner.cluster import DEFAULT_CLUSTER, load_cluster
from nsa_dist.planner.sweep import make_plan
from nsa_dist.train.export.run import plain_model
from nsa_dist.train.prepare import prepare_output
from nsa_dist.train.refused import Refused
from ranks import run_ranks
from train_cases import records, write_texts

pytestmark = pytest.mark.slow  # two processes train seven models


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_texts(folder / "texts")
    run_ranks(1, alone, folder)
    run_ranks(2, pair, folder)
    return folder


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_every_layout_trains_like_one_process(base, name, layout):
    got, expected = records(base, f"{name} {layout}"), records(base, name)
    assert [r["step"] for r in got] == list(range(1, STEPS + 1))
    for mine, alone_ in zip(got, expected, strict=True):
        assert mine["loss"] == pytest.approx(alone_["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(alone_["grad_norm"], rel=1e-6)


def test_the_models_differ_and_learn(base):
    losses = {name: [r["loss"] for r in records(base, name)] for name in ("dense", "both")}
    assert losses["dense"] != losses["both"]
    assert all(values[-1] < values[0] - 0.2 for values in losses.values())


def test_health_and_pictures_are_of_the_layers_that_select(base):
    for folder in ("both", "both TP2", "both PP2"):
        (*_, last) = records(base, folder, "health")
        assert last["layers"].keys() == {"1"}, "the second is dense"
        assert (base / folder / "selection.png").exists()
    assert [r["layers"] for r in records(base, "dense TP2", "health")] == [{}, {}]
    assert not (base / "dense/selection.png").exists()
    assert (base / "dense/loss.png").exists()


@pytest.mark.parametrize(("name", "other"), [("dense", "nsa"), ("both", "dense"), ("both", ["dense", "nsa"])])
def test_a_run_goes_on_with_its_own_attention_alone(base, name, other):
    with pytest.raises(Refused, match=r"model\.attention: the run has .*the model was trained to attend so"):
        prepare_output(config(base, name, other).resuming())


def test_one_pattern_has_one_spelling(base):
    prepare_output(config(base, "both", ["nsa", "dense"]).resuming())
    assert config(base, "x", ["dense", "dense"]).model.attention == "dense"
    four = config(base, "x", ["nsa", "dense", "nsa", "dense"], model={"num_layers": 4})
    assert four.model.attention == ["nsa", "dense"]
    assert four.model.layer_attentions == ("nsa", "dense", "nsa", "dense")


def test_who_knows_no_dense_layers_says_so(base):
    with pytest.raises(Refused, match=r"export one with model\.attention=nsa"):
        plain_model(base / "both", STEPS)
    with pytest.raises(ValueError, match=r"has dense layers.*plan with model\.attention=nsa"):
        make_plan(config(base, "x", "dense"), load_cluster(DEFAULT_CLUSTER))
    with pytest.raises(Refused, match="take context_parallel_size=1, or attention=nsa"):
        config(base, "x", "dense", parallel={"context_parallel_size": 2})
    with pytest.raises(Refused, match=r"must be one of nsa, dense.*give \[nsa, nsa, nsa, dense\]"):
        config(base, "x", "sparse")
    with pytest.raises(Refused, match="name each layer, or take num_layers=3"):
        config(base, "x", ["nsa", "nsa", "dense"])
