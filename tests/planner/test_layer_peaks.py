"""The planner's memory of one layer against peaks measured on a GPU, one rank of several with the others made up.

`nsa-dist bench cp --repeats 3 --only 128/128 --tokens 1048576` on one NVIDIA H200 (torch 2.11), 2026-11-24: Hq 64,
Hkv 4, D 128, bf16, forward and backward, inputs counted.
"""

import pytest

from nsa_dist.bench.case import Case
from nsa_dist.bench.predicted import core_of, strategy_of
from nsa_dist.planner.core.memory import layer_peak_bytes
from nsa_dist.planner.core.strategies import GIB, Options

K = 1024
BUDGET = 2**28
# (tokens, cp_size, mode, u, page budget): GiB
MEASURED = {
    (32 * K, 1, "fetch", 0.2, BUDGET): 5.64,
    (64 * K, 2, "fetch", 0.2, BUDGET): 5.36,
    (128 * K, 4, "fetch", 0.2, BUDGET): 5.49,
    (256 * K, 8, "fetch", 0.2, BUDGET): 5.74,
    (128 * K, 1, "fetch", 0.2, BUDGET): 16.06,
    (256 * K, 2, "fetch", 0.2, BUDGET): 14.69,
    (512 * K, 4, "fetch", 0.2, BUDGET): 15.20,
    (1024 * K, 8, "fetch", 0.2, BUDGET): 16.22,
    (1024 * K, 8, "fetch", 0.05, None): 15.76,
    (1024 * K, 8, "fetch", 0.2, None): 16.18,
    (1024 * K, 8, "fetch", 1.0, None): 18.57,
    (1024 * K, 8, "whole shard", 0.2, None): 19.23,
    (64 * K, 2, "all-gather", 0.2, None): 5.47,
    (128 * K, 4, "all-gather", 0.2, None): 5.79,
    (256 * K, 8, "all-gather", 0.2, None): 6.38,
    (256 * K, 2, "all-gather", 0.2, None): 16.59,
    (512 * K, 4, "all-gather", 0.2, None): 17.99,
    (1024 * K, 8, "all-gather", 0.2, None): 21.66,
}


@pytest.mark.parametrize("key", MEASURED, ids=str)
def test_predicted_peak_is_the_measured_one(key):
    tokens, cp_size, mode, u, budget = key
    case = Case(tokens, cp_size, mode, u, page_budget_bytes=budget)
    predicted = layer_peak_bytes(core_of(case), strategy_of(case), Options(fetch=case.fetch_options))
    assert predicted / GIB == pytest.approx(MEASURED[key], rel=0.1)
