"""Configurations drawn by seed through all checks before Ray: accepted, or refused. Some of the accepted train."""

import random
from pathlib import Path

import pytest

from drawn import accepted_and_small, checked, drawn, train_drawn, world_size_of
from ranks import run_ranks
from train_cases import write_texts

TRAINED = 30


def draw(home: Path, seeds: range, monkeypatch) -> list[str]:
    write_texts(home / "texts")
    monkeypatch.chdir(home)  # a relative folder is made below it
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ends = []
    for seed in seeds:
        path, words = drawn(random.Random(seed), home)
        try:
            ends.append(checked(path, words))
        except Exception as error:
            pytest.fail(f"seed {seed}, {words}, ended in {type(error).__name__}: {error}\n{path.read_bytes()[:2000]!r}")
    return ends


def judge(ends: list[str]) -> None:
    refused = [end for end in ends if end != "accepted"]
    assert len(ends) / 20 < len(refused) < len(ends) * 19 / 20, "both happen"
    assert all(0 < len(end) < 10_000 for end in refused)


def test_a_drawn_configuration_is_accepted_or_refused(tmp_path, monkeypatch):
    judge(draw(tmp_path, range(200), monkeypatch))


@pytest.mark.slow
def test_a_thousand_drawn_configurations_are_accepted_or_refused(tmp_path, monkeypatch):
    judge(draw(tmp_path, range(200, 1200), monkeypatch))


@pytest.mark.slow
def test_what_is_accepted_trains(tmp_path, monkeypatch):
    """In processes as a launcher would start them, one or two, each through several runs."""
    write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    seeds = accepted_and_small(tmp_path, range(5000, 10_000), TRAINED)
    assert len(seeds) == TRAINED
    sizes = {seed: world_size_of(tmp_path, seed) for seed in seeds}
    for size in sorted(set(sizes.values())):
        chosen = [seed for seed in seeds if sizes[seed] == size]
        for rank, outcomes in enumerate(run_ranks(size, train_drawn, tmp_path, chosen)):
            for seed, outcome in zip(chosen, outcomes, strict=True):
                if "is not finite" in outcome.end:  # as with weights of 1e18, about which nothing else is wrong
                    assert "No weight was moved by it" in outcome.end
                    continue
                assert outcome.end == "trained", f"seed {seed}, rank {rank}: {outcome.end}"
                assert outcome.steps == 2, seed
