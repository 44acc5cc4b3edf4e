"""Every process group gives up after the timeout that the default group has, and shows which rank it waits for."""

import pytest

from group_cases import TIMEOUT_S, Told, told
from ranks import run_ranks
from train_cases import small_config

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "data": {},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Told]:
    base = tmp_path_factory.mktemp("groups")
    configs = {name: small_config(base, name, parallel=keys) for name, keys in LAYOUTS.items()}
    return run_ranks(2, told, configs, base / "pulses")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_group_has_the_timeout_of_the_default_group(pair, layout):
    for rank in pair:
        found = rank.timeouts[layout]
        expected = ("TENSOR_MODEL", "PIPELINE_MODEL", "CONTEXT", "DATA", "DATA_PARALLEL_GROUP_WITH_CP", "MODEL")
        assert all(any(name in group for group in found) for name in expected), sorted(found)
        assert len(found) > 20, sorted(found)
        assert {name: s for name, s in found.items() if s != TIMEOUT_S} == {}


def test_signs_tell_who_is_waited_for_while_it_is(pair):
    (named,) = pair[1].hung
    assert named.startswith("rank 1 on ")
    assert "CONTEXT_PARALLEL_GROUP 0,1; it is in step 1, at " in named
    assert "waited_for" in named


def test_a_rank_that_comes_late_ends_the_wait_and_is_behind(pair):
    first, second = pair
    assert "Timed out" in first.raised
    assert first.begun.keys() == second.begun.keys()
    behind = {group for group, number in second.begun.items() if number < first.begun[group]}
    assert behind == {"CONTEXT_PARALLEL_GROUP 0,1"}
