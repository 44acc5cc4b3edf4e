"""Every process group gives up after the timeout that the default group has, whatever Megatron's own is."""

import pytest

from group_cases import TIMEOUT_S, late_rank, timeouts
from ranks import run_ranks
from train_cases import small_config

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "data": {},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict[str, dict[str, float]]]:
    base = tmp_path_factory.mktemp("groups")
    return run_ranks(2, timeouts, {name: small_config(base, name, parallel=keys) for name, keys in LAYOUTS.items()})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_group_has_the_timeout_of_the_default_group(told, layout):
    for rank in told:
        found = rank[layout]
        expected = ("TENSOR_MODEL", "PIPELINE_MODEL", "CONTEXT", "DATA", "DATA_PARALLEL_GROUP_WITH_CP", "MODEL")
        assert all(any(name in group for group in found) for name in expected), sorted(found)
        assert len(found) > 20, sorted(found)
        assert {name: s for name, s in found.items() if s != TIMEOUT_S} == {}


def test_a_rank_that_comes_late_ends_the_wait_and_is_behind(tmp_path):
    first, second = run_ranks(2, late_rank, small_config(tmp_path, "late", parallel={"context_parallel_size": 2}))
    assert "Timed out" in first[0]
    assert first[1].keys() == second[1].keys()
    behind = {group for group, number in second[1].items() if number < first[1][group]}
    assert behind == {"CONTEXT_PARALLEL_GROUP 0,1"}
