"""Runs with tasks: the same losses and answers in every layout and after a resume, and what is recorded of them."""

from pathlib import Path

import pytest

from nsa_dist.train.tasks.score import DEPTHS
from ranks import run_ranks
from task_run_cases import LAYOUTS, STEPS, TASKS, alone, pair
from train_cases import records, write_texts

pytestmark = pytest.mark.slow  # two processes train seven models


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_texts(folder / "texts")
    run_ranks(1, alone, folder)
    run_ranks(2, pair, folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_and_answers_like_one_process(base, layout):
    for mine, other in zip(records(base, layout), records(base, "alone"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
    got, expected = records(base, layout, "tasks"), records(base, "alone", "tasks")
    assert got == expected, "an answer is right or not"


def test_a_resumed_run_sees_the_samples_of_an_undisturbed_one(base):
    for kind in ("train", "tasks"):
        got, expected = records(base, "alone", kind), records(base, "undisturbed", kind)
        wanted = ["loss", "grad_norm"] if kind == "train" else ["tasks"]
        assert [[r[name] for name in ("step", *wanted)] for r in got] == [
            [r[name] for name in ("step", *wanted)] for r in expected
        ]


def test_what_is_recorded(base):
    found = records(base, "undisturbed", "tasks")
    assert [r["step"] for r in found] == [0, STEPS]
    for record in found:
        assert record["tasks"].keys() == TASKS.keys()
        for task in record["tasks"].values():
            assert list(task["by_length"]) == ["256", "128"]
            assert task["answers"] == sum(one["answers"] for one in task["by_length"].values())
            right = sum(one["accuracy"] * one["answers"] for one in task["by_length"].values())
            assert task["accuracy"] == pytest.approx(right / task["answers"])
            assert all(len(one["by_depth"]) == DEPTHS for one in task["by_length"].values())
    assert found[0]["tasks"]["copy"]["answers"] == found[-1]["tasks"]["copy"]["answers"], "the same samples"
    assert records(base, "undisturbed", "validation")[0]["loss"] > 5, "of text"
