"""NSASelfAttention over tensor- and context-parallel ranks, in fp64, against one process."""

import pytest

from mcore_cases import LAYOUTS, VARIANTS, WORLD, everything
from ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(WORLD, everything, str(tmp_path_factory.mktemp("checkpoints")))


def assert_passed(results, name: str) -> None:
    for rank, by_name in enumerate(results):
        assert not by_name[name], f"rank {rank}: {by_name[name]}"


@pytest.mark.parametrize("variant", [*VARIANTS, "pack"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_one_process(results, layout, variant):
    assert_passed(results, f"{layout}: {variant}")


@pytest.mark.parametrize(
    "name",
    [
        "recompute changes nothing",
        "a pack is its documents one by one",
        "a batch is its samples one by one",
        "a batch is cut into calls",
        "positions of an evaluation serve training",
        "checkpoint of TP2 in TP1",
        "checkpoint of TP1 in TP2",
        "recorded blocks",
        "lengths that do not divide",
        "packs that do not divide",
    ],
)
def test_promise(results, name):
    assert_passed(results, name)
