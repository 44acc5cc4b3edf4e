"""Inference contexts of Megatron-core, static and dynamic: step by step what the layer says of whole sequences."""

import pytest
import torch.distributed as dist

from mcore_cases import SINGLE, VARIANTS, groups
from mcore_dynamic_cases import DYNAMIC
from mcore_inference_cases import ALONE, WORLD, over_ranks
from ranks import run_ranks


@pytest.fixture(scope="module")
def one_rank():
    """Megatron's groups in this process: to start another takes longer than all that is tried."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with groups(SINGLE):
            yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ALONE)
def test_promise(one_rank, name):
    ALONE[name]()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in list(VARIANTS)[1:] else []) for name in DYNAMIC]
)
def test_promise_of_a_dynamic_context(one_rank, name):
    DYNAMIC[name]()


@pytest.mark.slow
def test_over_tensor_parallel_ranks():
    for rank, by_name in enumerate(run_ranks(WORLD, over_ranks)):
        assert by_name
        for name, failed in by_name.items():
            assert not failed, f"rank {rank}, {name}: {failed}"
