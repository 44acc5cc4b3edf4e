"""A static inference context of Megatron-core: step by step what the layer says of whole sequences."""

import pytest

from mcore_inference_cases import PROMISES, WORLD, everything
from ranks import run_ranks


@pytest.fixture(scope="module")
def results():
    return run_ranks(WORLD, everything)


@pytest.mark.parametrize("name", PROMISES)
def test_promise(results, name):
    for rank, by_name in enumerate(results):
        assert not by_name[name], f"rank {rank}: {by_name[name]}"
