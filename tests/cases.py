"""Random inputs of nsa_attention in fp64, shared by the tests of the reference and of context parallelism."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.compress import CompressMLP
from nsa_dist.cp.options import FetchOptions

# Everything happens within a few blocks: 2 of at most 4 to 8 visible blocks are free choices.
SMALL = NSAConfig(8, 4, 16, 5, 1, 2, 20)
PAPER = NSAConfig(num_slc_blocks=4)


@dataclass
class Inputs:
    q: Tensor
    kv: BranchKV
    gates: Tensor
    phi_k: CompressMLP
    phi_v: CompressMLP
    weight: Tensor  # the loss is sum(weight * out)

    def leaves(self) -> list[Tensor]:
        return [self.q, *self.kv, self.gates]

    def parameters(self) -> list[Tensor]:
        return [*self.phi_k.parameters(), *self.phi_v.parameters()]


def make_inputs(num_tokens: int, num_q_heads=4, num_kv_heads=2, dim_k=8, dim_v=8, cfg=SMALL, seed=0) -> Inputs:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    kv = BranchKV(*(normal(num_tokens, num_kv_heads, dim_v if name[0] == "v" else dim_k) for name in BranchKV._fields))
    phis = [CompressMLP(num_kv_heads, dim, cfg.cmp_block_len, 2 * dim, dtype=torch.float64) for dim in (dim_k, dim_v)]
    with torch.no_grad():
        for phi in phis:
            for parameter in phi.parameters():
                parameter.copy_(normal(*parameter.shape) / parameter.shape[1] ** 0.5)
    inputs = Inputs(
        q=2 * normal(num_tokens, num_q_heads, dim_k),
        kv=kv,
        gates=normal(num_tokens, num_q_heads, 3).sigmoid(),
        phi_k=phis[0],
        phi_v=phis[1],
        weight=normal(num_tokens, num_q_heads, dim_v),
    )
    for x in inputs.leaves():
        x.requires_grad_()
    return inputs


def run(
    inputs: Inputs, cfg: NSAConfig, lengths: list[int], plan: ShardPlan | None = None, rank=0, group=None, **kwargs
):
    """(out, block_indices, gradients of the leaves, gradients of phi's parameters) of one rank's shard.

    Heads go in four groups, as those of long calls do, if nothing else is asked for and the call is not in line.
    """
    fetch = kwargs.pop("fetch", None) or FetchOptions()
    if fetch.head_groups is None and not getattr(group, "most_in_line", 0):
        fetch = replace(fetch, head_groups=4)
    leaves = [x.detach() for x in inputs.leaves()]
    weight = inputs.weight
    if plan is not None:
        leaves, weight = [plan.shard(x, rank) for x in leaves], plan.shard(weight, rank)
    leaves = [x.detach().requires_grad_() for x in leaves]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, block_indices = nsa_attention(
        leaves[0], BranchKV(*leaves[1:7]), leaves[7], cfg, compress_k=inputs.phi_k, compress_v=inputs.phi_v,
        cu_seqlens=cu_seqlens, plan=plan, cp_group=group, fetch=fetch, return_block_indices=True, **kwargs,
    )  # fmt: skip
    grads = torch.autograd.grad((out * weight).sum(), [*leaves, *inputs.parameters()], materialize_grads=True)
    return out.detach(), block_indices, list(grads[:8]), list(grads[8:])
