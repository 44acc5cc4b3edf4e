"""Context parallelism with the Triton kernels, its ranks sharing one GPU over gloo."""

from functools import cache

import pytest
import torch

from cp_gpu_cases import BUDGETS, NAMES, compare, synchronisations
from nsa_dist.cp.device import put_on
from ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Sizes of the group, document lengths and (Hq, Hkv, D).
CASES = {
    "one document": ([2, 4, 8], [32768], (16, 4, 128)),
    "packed": ([2, 8], [20000, 31, 5000, 7737], (16, 4, 128)),
    "one kv head, in query halves": ([4], [32768], (16, 1, 128)),
}
RANKS = 8
GROUPS = [(case, size, layout) for case in CASES for size in CASES[case][0] for layout in ("zigzag", "contiguous")]


@cache
def outcome() -> list[dict] | Exception:
    try:
        return run_ranks(RANKS, compare, CASES)
    except Exception as error:  # kept, or every test would start the ranks again
        return error


def results() -> list[dict]:
    found = outcome()
    if isinstance(found, Exception):
        raise found
    return found


@pytest.fixture(params=GROUPS, ids=str)
def found(request):
    """What every rank of a group found."""
    _, size, _ = request.param
    return [results()[rank][request.param] for rank in range(size)]


@pytest.mark.parametrize("case", CASES)
def test_one_rank_errs_at_most_twice_as_much_as_plain_pytorch(case):
    assert results()[0][case, 1, "alone"]["worse"] == []


def test_same_bits_as_one_rank(found):
    for rank, of_rank in enumerate(found):
        assert of_rank["ids"], f"rank {rank}: other blocks were selected"
        assert {"out", "dq", "dgates"} <= set(of_rank["same"]), f"rank {rank}: only {of_rank['same']} are the same"


def test_two_runs_give_the_same_bits(found):
    for rank, of_rank in enumerate(found):
        assert of_rank["repeats"] == list(NAMES), f"rank {rank}"


def test_errors_are_at_most_twice_those_of_plain_pytorch(found):
    """Against the reference in fp32 with the same blocks: the output and every gradient, in one round."""
    for rank, of_rank in enumerate(found):
        assert of_rank["worse"] == [], f"rank {rank}"


def test_ranks_add_no_error(found):
    """Their parts are added in fp32: the root mean square of the errors is that of one rank, to a tenth."""
    for rank, of_rank in enumerate(found):
        assert of_rank["worse than one rank"] == [], f"rank {rank}"


@pytest.mark.parametrize("budget", BUDGETS)
def test_errors_in_rounds(found, budget):
    for rank, of_rank in enumerate(found):
        assert of_rank["worse in rounds"][budget] == [], f"rank {rank}"


def test_a_column_is_put_on_the_device_without_a_wait():
    """Which torch does not report: a copy from memory that is not pinned waits for all that is queued before it."""
    column, device = torch.arange(3 * 2**18).view(-1, 3)[:, 1], torch.device("cuda")
    put_on(device, column)  # pinned memory is there from now on
    torch.cuda.synchronize()
    slept = torch.cuda.Event()
    torch.cuda._sleep(10**9)
    slept.record()
    copied = put_on(device, column)
    assert not slept.query()
    assert torch.equal(copied.cpu(), column)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_the_host_waits_for_nothing_in_line(num_kv_heads):
    found = synchronisations(num_kv_heads)
    assert "synchroniz" in found["control"]
    assert found["forward"] == ""
    assert found["backward"] == ""
    assert found["sent"] == "bitmap compressed compressed.grad halo halo.grad pages pages.grad"
