"""A hundred damages of a run's folder, drawn by seed, each followed by a real resume: minutes long."""

from pathlib import Path

import pytest

from damages import contents
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


def is_repacked(one: Told) -> bool:
    """Without its list `data/` is no corpus and is packed again, to the same bytes."""
    return "lose data/corpus.json" in one.done and "run.json" not in one.hurt


def test_the_newest_whole_checkpoint_is_taken_and_every_loss_is_the_undisturbed_runs(base, told):
    for seed, one in zip(SEEDS, told, strict=True):
        goes_on = one.whole and (not one.hurt or is_repacked(one))
        assert one.step == (one.whole[0] if goes_on else -1), one
        if goes_on:
            assert numbers(base, f"seed {seed}", one.step) == numbers(base, "undisturbed", one.step), one
            assert contents(base / f"seed {seed}/data") == contents(base / "undisturbed/data"), one


def test_what_is_refused_names_its_files(told):
    refused = [one for one in told if one.step < 0]
    assert {bool(one.hurt) for one in refused} == {True, False}
    for one in refused:
        if "run.json" in one.hurt:
            assert "run.json" in one.said, one
            assert "back from a copy" in one.said, one
        elif one.whole:
            assert all(name.removeprefix("data/") in one.said or "corpus.json" in one.said for name in one.hurt), one
            assert "put the files back, or remove that folder" in one.said, one
        elif not one.hurt:
            assert "put these files back from a copy" in one.said, one
            assert all(f"checkpoints/step_{step:08d}" in one.said for step in (2, 4, 6)), one


def test_none_is_silent(told):
    assert sum(one.step == 4 for one in told) > 10
    for one in told:
        if 0 <= one.step < 6:
            assert "checkpoints/step_00000006" in one.said, one
        elif one.step == 6 and one.latest_changed:
            assert "latest.json" in one.said, one
        assert one.said or one.step == 6, one
