"""Context parallelism over real processes, in fp64, against one process: outputs, choices and every gradient.

Every case with up to eight ranks: test_cases.py, where ranks are threads.
"""

import itertools

import pytest

from cp_cases import LAYOUTS, OVER_PROCESSES, WORLD, everything
from ranks import run_ranks


@pytest.fixture(scope="module")
def results():
    return run_ranks(WORLD, everything)


@pytest.mark.parametrize(
    ("name", "layout", "size"),
    list(itertools.product(OVER_PROCESSES, LAYOUTS, range(1, WORLD + 1))),
    ids=lambda v: str(v),
)
def test_agrees_with_one_process(results, name, layout, size):
    for rank in range(size):
        message = results[rank][0][name, layout, size]
        assert not message, f"rank {rank}: {message}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counted_bytes_equal_the_formulas(results, layout):
    counted, _ = zip(*(results[rank][1][layout] for rank in range(WORLD)), strict=True)
    for rank in range(WORLD):
        _, expected = results[rank][1][layout]
        assert {kind: counted[rank][kind] for kind in expected} == expected
    # Gradients travel the same way back; pages went out twice, once more for backward.
    for kind, times in (("pages", 2), ("halo", 1)):
        assert sum(c[kind] for c in counted) == times * sum(c[f"{kind}.grad"] for c in counted) > 0


@pytest.mark.parametrize("what", ["documents", "layout", "config", "fetch options"])
def test_ranks_that_disagree_raise(results, what):
    for rank in range(2):
        assert "build the plan from the same cu_seqlens on every rank" in results[rank][2][what]
