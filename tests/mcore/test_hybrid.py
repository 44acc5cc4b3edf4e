"""NSA as the attention of Megatron-core's HybridModel, over ranks as on one."""

import pytest

from ranks import run_ranks

pytest.importorskip("megatron.core.models.hybrid", reason="HybridModel came with Megatron-core 0.19")

from mcore_hybrid_cases import PROMISES, WORLD, everything


@pytest.fixture(scope="module")
def results():
    return run_ranks(WORLD, everything)


@pytest.mark.parametrize("name", PROMISES)
def test_promise(results, name):
    for rank, by_name in enumerate(results):
        assert not by_name[name], f"rank {rank}: {by_name[name]}"
