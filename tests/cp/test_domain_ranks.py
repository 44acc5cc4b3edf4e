"""Ranks in domains over real processes, in fp64 against one process: 4 and 6 ranks as 2 and 3 domains."""

import pytest

from domain_cases import CASES, GROUPS, RANKS, agreement
from ranks import run_ranks


@pytest.fixture(scope="module")
def results():
    return run_ranks(RANKS, agreement)


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_process(results, name, group):
    for rank in range(group[0]):
        message = results[rank][(name, *group)]
        assert not message, f"rank {rank}: {message}"
