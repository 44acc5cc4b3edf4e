"""Layers of experts: the router against its formulas, and runs in every layout against one process."""

from pathlib import Path

import pytest
import torch

from expert_run_cases import (
    BACK,
    OF_FOUR,
    RUNS,
    STARTS,
    STEPS,
    alone,
    back,
    config,
    halfway,
    over_ranks,
    routed,
    starting,
)
from nsa_dist.inference.folder import save_model
from nsa_dist.train.export.run import plain_model
from nsa_dist.train.export.write import write
from nsa_dist.train.prepare import prepare_output
from nsa_dist.train.refused import Refused
from ranks import run_ranks
from train_cases import largest_difference, records, write_texts


def test_a_router_is_its_formulas(tmp_path):
    (found,) = run_ranks(1, routed, tmp_path)
    torch.testing.assert_close(*found.weights)
    assert found.loss[0] == pytest.approx(found.loss[1], rel=1e-6)
    torch.testing.assert_close(*found.grad)
    assert found.grad[0].abs().max() > 0
    assert found.counts[0] == found.counts[1]
    assert sum(found.counts[0]) == 2 * 15, "padding is no token"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_texts(folder / "texts")
    run_ranks(1, alone, folder)
    save_model(plain_model(folder / "shared")[0], folder / "shared.folder")
    run_ranks(2, over_ranks, folder, [one for one in RUNS if one[1] not in OF_FOUR])
    run_ranks(4, over_ranks, folder, [one for one in RUNS if one[1] in OF_FOUR])
    run_ranks(2, starting, folder)
    run_ranks(2, halfway, folder)
    run_ranks(1, back, folder)
    return folder


@pytest.mark.slow  # 20 runs
@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_every_layout_trains_like_one_process(base, name, layout):
    got, expected = records(base, f"{name} {layout}"), records(base, name)
    assert [r["step"] for r in got] == list(range(1, STEPS + 1))
    assert largest_difference(got, expected) < 1e-6
    got, expected = (records(base, folder, "experts") for folder in (f"{name} {layout}", name))
    assert largest_difference(got, expected, ("load_balancing_loss",)) < 1e-6
    for mine, alone_ in zip(got, expected, strict=True):
        for layer, values in alone_["layers"].items():
            assert [mine["layers"][layer][name] == values[name] for name in ("busiest", "least")] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), BACK)
def test_one_process_goes_on_from_every_layout(base, name, layout):
    got, expected = records(base, f"{name} {layout} and back"), records(base, name)
    assert [r["step"] for r in got] == list(range(1, STEPS + 1))
    assert largest_difference(got, expected) < 1e-6


@pytest.mark.slow
def test_what_is_recorded(base):
    for name, layers in {"experts": ["1", "2"], "shared": ["2"]}.items():
        losses, last = [r["loss"] for r in records(base, name)], records(base, name, "experts")[-1]
        assert losses[-1] < losses[0] - 1
        assert list(last["layers"]) == layers
        for layer in last["layers"].values():
            assert 0 < layer["least"] < 1 < layer["busiest"] < 2, "two of four experts a token"
            assert 1 < layer["load_balancing_loss"] < 2
        assert last["busiest"] == max(layer["busiest"] for layer in last["layers"].values())
        assert last["least"] == min(layer["least"] for layer in last["layers"].values())


@pytest.mark.slow
def test_the_loss_of_balance_makes_experts_even_and_is_no_part_of_other_losses(base):
    even, uneven = (records(base, name) for name in ("experts", "uneven"))
    assert even[0]["loss"] == uneven[0]["loss"]
    assert even[0]["grad_norm"] != uneven[0]["grad_norm"]
    assert records(base, "experts", "validation")[0]["loss"] == records(base, "uneven", "validation")[0]["loss"]
    even, uneven = (records(base, name, "experts") for name in ("experts", "uneven"))
    assert even[0] == uneven[0]
    assert even[-1]["load_balancing_loss"] < uneven[-1]["load_balancing_loss"]
    assert even[-1]["busiest"] < uneven[-1]["busiest"]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "layout"), STARTS)
def test_a_run_starts_from_anothers_experts(base, source, layout):
    expected = records(base, "shared", "validation")[-1]["loss"]
    assert records(base, f"of {source} {layout}", "validation")[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_experts_are_the_runs_own(base, tmp_path):
    with pytest.raises(Refused, match=r"model\.moe_router_topk: the run has 2, given is 3"):
        prepare_output(config(base, "experts", "experts", model={"moe_router_topk": 3}).resuming())
    prepare_output(config(base, "experts", "experts", model={"moe_aux_loss_coeff": 0.1}).resuming())
    keys = {"start_from": base / "shared"}
    with pytest.raises(Refused, match=r"is another model.*(?s:.)*moe_layer_freq: .* has \[0, 1\], the run \[1, 1\]"):
        prepare_output(config(base, "other", "experts", run=keys))
    assert write(base / "experts", tmp_path / "out").kind == "an NSA model"
