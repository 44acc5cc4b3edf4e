"""configs/tiny-cpu.yaml as it is shipped, over its whole length, under three layouts: a quarter of an hour."""

import pytest

from ranks import run_ranks
from train_cases import records, whole_tiny_job

LAYOUTS = {
    "cp 1": {"context_parallel_size": 1},
    "cp 2 zigzag": {"context_parallel_size": 2, "layout": "zigzag"},
    "cp 2 contiguous": {"context_parallel_size": 2, "layout": "contiguous"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("tiny")
    for name, parallel in LAYOUTS.items():
        run_ranks(parallel["context_parallel_size"], whole_tiny_job, base, name, parallel, name == "cp 2 zigzag")
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "cp 1"])
def test_every_step_of_the_tiny_job_has_the_loss_of_one_rank(base, name):
    """Every step, not the last alone: a block flipped early shows tens of steps later (docs/decisions/tiny-job.md)."""
    got, expected = records(base, name), records(base, "cp 1")
    assert [r["step"] for r in got] == list(range(1, len(expected) + 1))
    differences = [abs(g["loss"] / e["loss"] - 1) for g, e in zip(got, expected, strict=True)]
    assert max(differences) < 1e-4, f"at step {1 + differences.index(max(differences))}"


@pytest.mark.slow
def test_the_tiny_job_learns(base):
    validation = records(base, "cp 2 zigzag", "validation")
    assert 5.4 < validation[0]["loss"] < 5.8
    assert validation[-1]["loss"] < 2.3
    assert validation[-1]["step"] == len(records(base, "cp 2 zigzag"))
