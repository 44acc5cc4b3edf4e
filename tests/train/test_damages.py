"""A hundred damages of a run's checkpoints, drawn by seed, each followed by a real resume: minutes long."""

from pathlib import Path

import pytest

from ranks import run_ranks
from train_cases import Told, past_drawn_damages, records, undisturbed_and_stopped, write_texts

pytestmark = pytest.mark.slow
SEEDS = range(1000, 1100)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damages")
    write_texts(folder / "texts")
    run_ranks(1, undisturbed_and_stopped, folder)
    return folder


@pytest.fixture(scope="module")
def told(base) -> list[Told]:
    return run_ranks(1, past_drawn_damages, base, SEEDS)[0]


def numbers(base: Path, name: str, step: int) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(base, name) if r["step"] > step]


def test_the_newest_whole_checkpoint_is_taken_and_every_loss_is_the_undisturbed_runs(base, told):
    for seed, one in zip(SEEDS, told, strict=True):
        assert one.step == (one.whole[0] if one.whole else -1), one
        if one.whole:
            assert numbers(base, f"seed {seed}", one.step) == numbers(base, "undisturbed", one.step), one


def test_what_is_refused_names_its_files(told):
    refused = [one for one in told if one.step < 0]
    assert refused
    for one in refused:
        assert "put these files back from a copy" in one.said, one
        assert all(f"checkpoints/step_{step:08d}" in one.said for step in (2, 4, 6)), one


def test_none_is_silent(told):
    assert sum(one.step == 4 for one in told) > 20
    for one in told:
        if one.step < 6:
            assert "checkpoints/step_00000006" in one.said, one
        elif one.latest_changed:
            assert "latest.json" in one.said, one
