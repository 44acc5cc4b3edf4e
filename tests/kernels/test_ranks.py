"""The kernels under context parallelism: the same bits for any number of ranks, in head groups and in query halves."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

import nsa_kernels
from cases import run
from kernels.pace import SLOW_WITHOUT_A_GPU
from nsa_dist import BranchKV, NSAConfig, ShardPlan
from thread_ranks import run_threads

CONFIG = NSAConfig(32, 16, 64, 4, 1, 2, 100)
LENGTHS = [260, 31, 120]


@cache
def inputs(num_kv_heads: int, device: torch.device):
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).bfloat16().to(device)

    num_tokens = sum(LENGTHS)
    kv = BranchKV(*(normal(num_tokens, num_kv_heads, 16) for _ in BranchKV._fields))
    q, gates = normal(num_tokens, 4, 16), normal(num_tokens, 4, 3).sigmoid()
    leaves = [q, *kv, gates]
    return SimpleNamespace(
        leaves=lambda: leaves, weight=normal(num_tokens, 4, 16), phi_k=None, phi_v=None, parameters=list
    )


@cache
def alone(num_kv_heads: int, device: torch.device):
    return run(inputs(num_kv_heads, device), CONFIG, LENGTHS, ops=nsa_kernels)


@pytest.mark.parametrize(
    "num_kv_heads",
    [pytest.param(2, id="head by head"), pytest.param(1, id="query halves", marks=SLOW_WITHOUT_A_GPU)],
)
@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("zigzag", 2),
        pytest.param("zigzag", 3, marks=pytest.mark.slow),
        pytest.param("contiguous", 2, marks=pytest.mark.slow),
    ],
)
def test_same_bits_for_any_number_of_ranks(num_kv_heads, layout, size, device):
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)

    def work(comm):
        plan = getattr(ShardPlan, layout)(bounds, size)
        return plan, run(inputs(num_kv_heads, device), CONFIG, LENGTHS, plan, comm.rank, comm, ops=nsa_kernels)

    expected = alone(num_kv_heads, device)
    for rank, (plan, (out, block_indices, grads, _)) in enumerate(run_threads(size, work)):
        real = ~plan.padding(rank).to(device)
        ids = plan.shard(expected[1].long() + 1, rank) - 1
        assert torch.equal(block_indices[real].long(), ids[real])
        assert torch.equal(out[real], plan.shard(expected[0], rank)[real])
        assert torch.equal(grads[0][real], plan.shard(expected[2][0], rank)[real]), "dq"
        assert torch.equal(grads[7][real], plan.shard(expected[2][7], rank)[real]), "gradient of the gates"
        for mine, whole in zip(grads[1:7], expected[2][1:7], strict=True):
            error = (mine[real].float() - plan.shard(whole, rank)[real].float()).norm()
            assert error <= 6e-3 * whole.float().norm()
