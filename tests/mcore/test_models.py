"""Whole GPT models with NSA layers: what they build and refuse, over ranks as on one."""

import pytest

from mcore_model_cases import PROMISES, WORLD, everything
from ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(WORLD, everything, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.parametrize("name", PROMISES)
def test_promise(results, name):
    for rank, by_name in enumerate(results):
        assert not by_name[name], f"rank {rank}: {by_name[name]}"
