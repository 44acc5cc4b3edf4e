"""Launches that are repeated: the bits of an attention whose host prepares each of them."""

import pytest
import torch

from nsa_dist import BranchKV, NSAConfig, ShardPlan, attention, nsa_attention
from nsa_dist.compress import CompressMLP

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Documents, (Hq, Hkv, Dk, Dv).
CASES = {
    "Hopper kernels": ([0, 4096], (64, 4, 128, 128)),
    "packed, with tails": ([0, 1000, 1031, 2500], (16, 2, 128, 128)),
    "plain kernels": ([0, 1500], (8, 2, 192, 128)),
    "another group": ([0, 2048], (6, 2, 64, 64)),
}


def draw(plan: ShardPlan, heads: tuple[int, int, int, int], seed: int, fused: bool) -> list[torch.Tensor]:
    """q, gates, the six of K/V; `fused`: K/V are views of one tensor."""
    generator = torch.Generator("cuda").manual_seed(seed)
    num_q_heads, num_kv_heads, dim_k, dim_v = heads

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(plan.tokens_per_rank, *shape, generator=generator, device="cuda").bfloat16()

    kv = randn(num_kv_heads, 3 * (dim_k + dim_v)).split((dim_k, dim_v) * 3, -1)
    kv = kv if fused else [x.contiguous() for x in kv]
    return [x.detach().requires_grad_() for x in (randn(num_q_heads, dim_k), randn(num_q_heads, 3).sigmoid(), *kv)]


def results(plan, inputs, phis) -> list[torch.Tensor]:
    q, gates, *kv = inputs
    out, ids = nsa_attention(
        q, BranchKV(*kv), gates, NSAConfig(), compress_k=phis[0], compress_v=phis[1], plan=plan,
        return_block_indices=True,
    )  # fmt: skip
    upstream = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(7), device="cuda").bfloat16()
    parameters = [p for phi in phis for p in phi.parameters()]
    return [out.detach(), ids, *torch.autograd.grad(out, [*inputs, *parameters], upstream)]


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_repeated_launches_give_the_same_bits(name, fused, monkeypatch):
    documents, heads = CASES[name]
    phis = [CompressMLP(heads[1], dim, 32, device="cuda", dtype=torch.bfloat16) for dim in heads[2:]]
    plan, plain = ShardPlan.contiguous(documents, 1), ShardPlan.contiguous(documents, 1)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "MOST_IN_LINE", 0)
        expected = {seed: results(plain, draw(plan, heads, seed, fused), phis) for seed in range(3)}
    for seed in (0, 1, 2, 1, 0):
        found = results(plan, draw(plan, heads, seed, fused), phis)
        differing = [i for i, pair in enumerate(zip(found, expected[seed], strict=True)) if not torch.equal(*pair)]
        assert differing == []
    ((tapes, _),) = (kept for key, kept in plan._cache.items() if key[0] == "tapes")
    for name, part in tapes.items():
        if "halo" in name:  # a lone rank has none
            assert not part._tapes
            continue
        recorded = list(part._tapes.values())[-1]
        assert recorded is not None  # or it was never asked for, or only once
        assert recorded.obstacle == ""


def requested(kind: str) -> int:
    """Bytes that tensors asked for; the blocks that they get are up to 1 MiB larger, as what was free there was."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]


def test_no_more_memory_than_without(monkeypatch):
    documents, heads = CASES["Hopper kernels"]
    phis = [CompressMLP(heads[1], dim, 32, device="cuda", dtype=torch.bfloat16) for dim in heads[2:]]
    peaks = {}
    for most in (0, attention.MOST_IN_LINE):
        monkeypatch.setattr(attention, "MOST_IN_LINE", most)
        plan = ShardPlan.contiguous(documents, 1)
        inputs = draw(plan, heads, 0, fused=False)
        for _ in range(3):
            results(plan, inputs, phis)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = requested("current")
        results(plan, inputs, phis)
        peaks[most] = requested("peak") - before
    without, taped = peaks.values()
    statistics = documents[-1] * heads[0] * 4  # one branch's log-sum-exp may live for a launch more
    assert taped <= without + statistics
