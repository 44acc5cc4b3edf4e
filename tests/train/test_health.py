"""What is decided and measured of a run's health, in parts; one run that goes back. Whole runs: test_health_runs.py."""

import math
from pathlib import Path

import pytest
import torch

from health_cases import goes_back_and_is_slow
from nsa_dist.train.config import RunSection
from nsa_dist.train.health.attention import entropy
from nsa_dist.train.health.finite import Patience
from nsa_dist.train.health.record import work_record
from nsa_dist.train.health.replicas import differing, hash_of
from ranks import run_ranks
from train_cases import records, write_texts


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("health")
    write_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def pair(base) -> list[tuple]:
    return run_ranks(2, goes_back_and_is_slow, base)


def test_a_run_goes_back_once_and_ends_where_that_does_not_help(base, pair):
    for told, _, _ in pair:
        assert told.firsts == [0, 4, 8, 12, 8, 16]
        assert told.untouched == [True, True]
        assert "the run has gone back for step 4 before, and left its samples out" in str(told.result.failure)
        assert told.result.checkpoint == str(base / "back/checkpoints/step_00000002")
    assert [r["step"] for r in records(base, "back")] == [1, 2, 3]
    assert [r["step"] for r in records(base, "back", "health")] == [2]


def test_a_launcher_is_told_what_every_rank_begins(pair):
    until_4 = [("step", 3), ("validation", 3), ("step", 4)]
    expected = [("validation", 0), ("step", 1), ("step", 2), ("checkpoint", 2), *until_4, ("rewind", 4), *until_4]
    assert [begun for _, begun, _ in pair] == [expected, expected]


def patience(**keys) -> Patience:
    return Patience(RunSection(output_dir="x", global_batch_size=4, **keys))


def test_patience_is_counted_in_a_row():
    one = patience(not_finite="skip", not_finite_limit=1)
    for step in range(1, 9, 2):
        assert one.answer(step, 4 * step, True).action == "skip"
        one.was_finite()
    assert one.answer(9, 36, True).action == "skip"
    assert one.answer(10, 40, True).action == "stop"


def test_no_rewinds_without_end():
    one = patience(not_finite="rewind")
    answers = [one.answer(step, 4 * step, True).action for step in (5, 7, 7)]
    assert answers == ["rewind", "rewind", "stop"]
    assert patience(not_finite="rewind").answer(3, 8, False).action == "stop"
    assert one.first_of(20) == 24
    assert one.first_of(24) == 24


def test_the_minority_is_named():
    table = [[1, 5, 9], [1, 5, 9], [1, 6, 8]]
    assert differing(["a", "b", "c"], [0, 4, 8], table) == [("b", [8]), ("c", [8])]
    assert differing(["a"], [2, 3], [[1], [2]]) == [("a", [2, 3])]
    assert differing(["a"], [0, 1], [[1], [1]]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_hash_sees_every_bit_and_every_place(dtype):
    torch.manual_seed(0)
    x = (torch.randn(40, 30) * 10).to(dtype)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    x[0, 0], x[0, 1] = 1, 2
    seen = {int(hash_of(x))}
    for bit in range(8 * x.element_size()):
        y = x.clone()
        spelled = y.view(integers)
        spelled[7, 3] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(integers)
        seen.add(int(hash_of(y)))
    assert len(seen) == 8 * x.element_size() + 1
    swapped = x.clone()
    swapped.view(-1)[[0, 1]] = x.view(-1)[[1, 0]]
    assert int(hash_of(swapped)) not in seen
    assert hash_of(x) == hash_of(x.clone())


def test_a_hash_is_that_of_the_whole_however_it_is_read(monkeypatch):
    x = torch.randn(1000)
    whole = hash_of(x)
    monkeypatch.setattr("nsa_dist.train.health.replicas._AT_ONCE", 7)
    assert hash_of(x) == whole


def test_waiting_is_no_work(pair):
    """Rank 1 computes eight times as much, and rank 0 waits for it."""
    first_work, first_wait, second_work, _ = pair[0][2]
    assert first_work < second_work
    assert first_wait > first_work


def test_the_slowest_rank_is_told_against_the_median():
    record = work_record([1.0, 1.1, 1.65, 1.0, 1.1])
    assert (record["slowest_rank"], record["slowest_ratio"]) == (2, pytest.approx(1.5))
    assert work_record([0.5])["slowest_ratio"] == 1


def test_entropy():
    assert entropy(torch.tensor([4.0, 4.0, 0.0, 4.0, 4.0])) == pytest.approx(math.log(4))
    assert entropy(torch.tensor([7.0, 0.0])) == 0
    assert entropy(torch.zeros(3)) == 0
