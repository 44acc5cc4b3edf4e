"""Checkpoints of six layouts over four processes, gone on from in all six: weights, optimizer, place in the data."""

import pytest
import torch

from nsa_dist.train.files.candidates import name_of
from ranks import run_ranks
from reshard_cases import (
    LAYOUTS,
    PAIRS,
    SAVE_STEP,
    WORLD,
    alone,
    every_layout_goes_on_in_every_other,
    every_layout_saves,
    passed_on,
    tensors_of,
)
from train_cases import largest_difference, records, write_texts

pytestmark = pytest.mark.slow  # 78 short runs of four processes


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    base = tmp_path_factory.mktemp("resharding")
    write_texts(base / "texts")
    run_ranks(1, alone, base, "fp32")
    return base


@pytest.fixture(scope="module")
def runs(single):
    run_ranks(WORLD, every_layout_saves, single, "fp32")
    run_ranks(WORLD, every_layout_goes_on_in_every_other, single)
    return single


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base = tmp_path_factory.mktemp("saved")
    write_texts(base / "texts")
    run_ranks(1, alone, base, "bf16")
    run_ranks(WORLD, every_layout_saves, base, "bf16")
    run_ranks(WORLD, passed_on, base)
    return base


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_run_goes_on_in_another_layout_as_one_process(runs, source, target):
    """Three layouts in one run: one process, `source`, `target`. The last step sees the optimizer's moments."""
    expected, got = records(runs, "alone"), records(runs, f"{source} to {target}")
    assert [(r["step"], r["samples"]) for r in got] == [(r["step"], r["samples"]) for r in expected]
    assert largest_difference(got, expected) < 1e-6


def test_without_the_moments_it_would_be_seen(runs):
    assert largest_difference(records(runs, "without moments"), records(runs, "alone")) > 1e-3


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_is_saved_again_has_every_bit(saved, source, target):
    """bf16: weights, the optimizer's fp32 weights, moments; through another layout and whole again."""
    before = tensors_of(saved / source / name_of(SAVE_STEP))
    after = tensors_of(saved / f"{source} by {target}" / name_of(SAVE_STEP))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_optimizer_keeps_fp32_weights(saved, layout):
    found = tensors_of(saved / layout / name_of(SAVE_STEP))
    of_optimizer = {key: value for key, value in found.items() if key.startswith("optimizer")}
    assert {value.dtype for value in of_optimizer.values()} == {torch.float32}
    for part in ("fp32_param", "exp_avg.", "exp_avg_sq."):
        assert any(part in key and value.abs().max() > 0 for key, value in of_optimizer.items()), (part, list(found))
