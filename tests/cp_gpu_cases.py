"""Several ranks on one GPU over gloo, with the Triton kernels, against one rank: what tests/cp/test_gpu.py runs."""

import torch
import torch.distributed as dist

from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.compress import CompressMLP
from nsa_dist.cp.fetch import FetchOptions
from ranks import groups_up_to
from thread_ranks import run_threads


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
                leaves, phis, weight, cu_seqlens, plan, rank, groups[size], FetchOptions(kv_fetch_budget_bytes=2**24)
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


def synchronisations(num_kv_heads: int) -> dict[str, str]:
    """What torch says of forward and backward where the host would wait for the device in line: "" if it does not.

    Two ranks as threads, so that no transport is in the way. The wait for the bits of the selection, an event that
    has come while the next stage was queued, is not one of those that torch reports.
    """
    leaves, phis, weight = make_inputs(8192, 16, num_kv_heads, 128)
    found = {"forward": "", "backward": ""}

    def work(comm):
        plan = ShardPlan.zigzag([0, 8192], comm.size)
        shards = [plan.shard(x, comm.rank).detach().requires_grad_() for x in leaves]
        grad_out = plan.shard(weight, comm.rank)

        def forward():
            return nsa_attention(
                shards[0], BranchKV(*shards[1:7]), shards[7], NSAConfig(), compress_k=phis[0], compress_v=phis[1],
                plan=plan, cp_group=comm,
            )  # fmt: skip

        torch.autograd.grad(forward(), shards, grad_out)  # kernels are compiled and layouts made
        torch.cuda.synchronize()
        for name, run in (("forward", forward), ("backward", lambda: torch.autograd.grad(forward(), shards, grad_out))):
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            except RuntimeError as error:
                found[name] = str(error)
                raise
            finally:
                torch.cuda.set_sync_debug_mode("default")

    try:
        run_threads(2, work)
    except RuntimeError:
        assert any(found.values())
    return found


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
