"""Several ranks on one GPU over gloo, with the Triton kernels, against one rank: what tests/cp/test_gpu.py runs."""

import torch
import torch.distributed as dist

from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.compress import CompressMLP
from nsa_dist.cp.fetch import FetchOptions
from ranks import groups_up_to


def make_inputs(num_tokens: int, num_q_heads: int, num_kv_heads: int, dim: int) -> tuple[list, list, torch.Tensor]:
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device="cuda").bfloat16()

    leaves = [normal(num_tokens, num_q_heads, dim), *(normal(num_tokens, num_kv_heads, dim) for _ in range(6))]
    leaves.append(torch.rand(num_tokens, num_q_heads, 3, generator=gen, device="cuda"))
    torch.manual_seed(0)
    phis = [CompressMLP(num_kv_heads, dim, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return leaves, phis, normal(num_tokens, num_q_heads, dim)


def attend(leaves, phis, weight, cu_seqlens, plan=None, rank=0, group=None, fetch=None):
    """(out, block_indices, gradients of q, six of K/V, gates) of one rank's shard."""
    leaves = [(x if plan is None else plan.shard(x, rank)).detach().requires_grad_() for x in leaves]
    weight = weight if plan is None else plan.shard(weight, rank)
    out, ids = nsa_attention(
        leaves[0], BranchKV(*leaves[1:7]), leaves[7], NSAConfig(), compress_k=phis[0], compress_v=phis[1],
        cu_seqlens=None if plan else cu_seqlens, plan=plan, cp_group=group, fetch=fetch, return_block_indices=True,
    )  # fmt: skip
    grads = torch.autograd.grad(out, leaves, weight)
    return out.detach(), ids, grads


def compare(rank: int, sizes: list[int], lengths: list[int], heads: tuple[int, int, int]) -> dict[tuple, dict]:
    """For each (cp_size, layout): what is bitwise equal to one rank, and relative errors of the K/V gradients."""
    torch.cuda.set_device(0)
    groups = groups_up_to(max(sizes))
    leaves, phis, weight = make_inputs(sum(lengths), *heads)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    expected = attend(leaves, phis, weight, cu_seqlens)
    result = {}
    for size in sizes:
        for layout in ("zigzag", "contiguous"):
            if rank >= size:
                continue
            plan = getattr(ShardPlan, layout)(cu_seqlens, size)
            got = attend(leaves, phis, weight, cu_seqlens, plan, rank, groups[size])
            again = attend(leaves, phis, weight, cu_seqlens, plan, rank, groups[size])
            rounds = attend(
                leaves, phis, weight, cu_seqlens, plan, rank, groups[size], FetchOptions(kv_fetch_budget_bytes=2**22)
            )
            real = ~plan.padding(rank).cuda()
            whole = [plan.shard(x, rank) for x in (expected[0], expected[1].long() + 1, *expected[2])]
            result[size, layout] = {
                "out": torch.equal(got[0][real], whole[0][real]),
                "ids": torch.equal(got[1][real].long(), whole[1][real] - 1),
                "dq": torch.equal(got[2][0][real], whole[2][real]),
                "repeat": all(torch.equal(a, b) for a, b in zip((got[0], *got[2]), (again[0], *again[2]), strict=True)),
                "error": [_relative(a[real], b[real]) for a, b in zip(got[2], whole[2:], strict=True)],
                "rounds error": [
                    _relative(a[real], b[real]) for a, b in zip((rounds[0], *rounds[2]), (got[0], *got[2]), strict=True)
                ],
            }
    dist.barrier()
    return result


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
