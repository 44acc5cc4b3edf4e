"""Two context-parallel ranks on one laptop: each holds half of the tokens, and together they compute what one would.

    torchrun --nproc-per-node 2 examples/two_ranks.py

The ranks talk over gloo, so no GPU is needed. In fp64, so that "the same" means to the last digits.
"""

import os
import sys

import torch
import torch.distributed as dist

from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.cp.comm import Traffic

T, Hq, Hkv, D = 1024, 4, 2, 16
CFG = NSAConfig(num_slc_blocks=4, window_len=128)


def attend(q, kv, gates, upstream, **over_ranks):
    """The output, and the gradients of q, the six keys and values, and the gates."""
    leaves = [x.detach().requires_grad_() for x in (q, *kv, gates)]
    out = nsa_attention(leaves[0], BranchKV(*leaves[1:7]), leaves[7], CFG, **over_ranks)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def main():
    dist.init_process_group("gloo")
    rank, cp_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # every rank draws the same whole sequence here; a real one only ever has its own part

    def draw(*shape):
        return torch.randn(T, *shape, dtype=torch.float64)

    q, gates, upstream = draw(Hq, D), draw(Hq, 3).sigmoid(), draw(Hq, D)
    kv = BranchKV(*(draw(Hkv, D) for _ in range(6)))
    expected = attend(q, kv, gates, upstream)  # on this rank alone, without the other

    # The plan says which tokens a rank holds. Zigzag: of 2P chunks rank r has chunks r and 2P-1-r, an early one and a
    # late one, so that causal attention is about the same work for all.
    plan = ShardPlan.zigzag([0, T], cp_size, CFG.slc_block_len)
    mine = [plan.shard(x, rank) for x in (q, *kv, gates, upstream)]
    traffic = Traffic()
    found = attend(
        mine[0], BranchKV(*mine[1:7]), mine[7], mine[8], plan=plan, cp_group=dist.group.WORLD, traffic=traffic
    )

    names = ["out", "dq", *(f"d{name}" for name in BranchKV._fields), "dgates"]
    errors = {
        name: (mine - plan.shard(whole, rank)).abs().max().item()
        for name, mine, whole in zip(names, found, expected, strict=True)
    }
    worst = max(errors, key=errors.get)
    dist.barrier()
    for speaker in range(cp_size):
        if rank == speaker:
            held = ", ".join(f"{s.start}..{s.stop - 1}" for s in plan.segments(rank))
            print(f"rank {rank} holds tokens {held}; sent {dict(traffic.sent_bytes)} bytes", flush=True)
            print(f"  output and gradients differ from one rank's by at most {errors[worst]:.1e} ({worst})", flush=True)
        dist.barrier()
    dist.destroy_process_group()
    if errors[worst] > 1e-10:
        sys.exit(f"rank {rank}: {worst} is not what one rank computes")


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("this needs a process for each rank: torchrun --nproc-per-node 2 examples/two_ranks.py")
    main()
