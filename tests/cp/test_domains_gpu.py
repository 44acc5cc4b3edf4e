"""Ranks in domains with a GPU each, over NCCL: four as 2 x 2, bit for bit against one rank."""

from functools import cache

import pytest
import torch

from cp_gpu_cases import NAMES
from domain_gpu_cases import CASES, DOMAIN, compare
from one_sided_gpu_cases import on_gpus

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
USED = NUM_GPUS // DOMAIN * DOMAIN
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(USED < 2 * DOMAIN, reason="needs four CUDA devices of one host")]


@cache
def outcome() -> list[dict]:
    return on_gpus(USED, compare)


@pytest.mark.parametrize("name", CASES)
def test_blocks_outputs_and_dq_have_the_bits_of_one_rank_and_gradients_repeat(name):
    for of_rank in outcome():
        found = of_rank[name]
        assert found["ids"]
        assert found["repeats"] == list(NAMES)
        assert max(found["errors"].values()) < 1e-2
        if name != "in rounds":  # where partial results are merged
            assert {"out", "dq", "dgates"} <= set(found["same"])
