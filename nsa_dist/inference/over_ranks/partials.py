"""Partial results of ranks, put together on each of them in the order of the ranks: the same bits everywhere.

A partial result of attention is (out, softmax_lse) over the keys of one rank; a row that saw none is (0, -inf). The
importance of a block is found by one rank alone, from the merged softmax_lse: with one of its own, equal scores on two
ranks would be scaled by different numbers, and training's rule for ties could not hold.
"""

import torch
from torch import Tensor

from nsa_dist.cp.comm import Comm


def gather_checked(x: Tensor, same: Tensor, kind: str, comm: Comm) -> Tensor:
    """[P, ...]: each rank's x [...].

    same    int64 [count], which every rank must have alike: compared where the host need not wait for it, on CPUs

    ValueError on all ranks if it differs.
    """
    as_int = torch.int64 if x.dtype == torch.float64 else torch.int32
    sent = torch.cat([x.contiguous().flatten().view(as_int), same.view(as_int)])
    gathered = comm.all_gather(sent, kind)
    told = gathered[:, x.numel() :]
    if not told.is_cuda and bool((told != told[0]).any()):
        raise ValueError(
            f"the ranks of cp_group were given different tokens or sequences: every rank appends to its own copy of "
            f"the window and compresses for itself, so rank {comm.rank} would go on from another text; pass the same "
            f"q, kv, gates and seqs on every rank (a broadcast of the drawn token is enough)"
        )
    return gathered[:, : x.numel()].contiguous().view(x.dtype).view(comm.size, *x.shape)


def gather_outs(
    partials: list[tuple[Tensor, Tensor]], lses: list[Tensor | None], comm: Comm, same: Tensor | None = None
) -> list[Tensor]:
    """The out [T, Hq, Dv] of each branch over all ranks' keys, in the dtype of the partial ones.

    partials    (out, softmax_lse) of this rank, one for each branch
    lses        the merged softmax_lse of each; None: it is found here
    same        as `gather_checked` takes it; None: nothing is compared
    """
    wide = torch.promote_types(partials[0][0].dtype, torch.float32)
    sent = torch.cat([torch.cat([out.to(wide), lse.to(wide)[..., None]], -1) for out, lse in partials], -1)
    same = sent.new_empty(0, dtype=torch.int64) if same is None else same
    gathered = gather_checked(sent, same, "partials", comm)
    sizes = [out.shape[-1] + 1 for out, _ in partials]
    return [
        _merged(part[..., :-1], part[..., -1], lse).to(partials[0][0].dtype)
        for part, lse in zip(gathered.split(sizes, -1), lses, strict=True)
    ]


def _merged(outs: Tensor, lses: Tensor, lse: Tensor | None) -> Tensor:
    """outs [P, T, Hq, Dv], lses [P, T, Hq] -> [T, Hq, Dv] (arXiv:1805.02867, section 3.1)."""
    whole = lses.logsumexp(0) if lse is None else lse.to(lses.dtype)
    weight = torch.exp(lses - whole.masked_fill(whole == -torch.inf, 0.0))  # exp(-inf + inf) would be NaN
    return (weight[..., None] * outs).sum(0)


def checksum(tensors: list[Tensor]) -> Tensor:
    """int64 [1] of the bits of the tensors, exact in any order of summing."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [x.detach().contiguous().view(kinds[x.itemsize]).sum(dtype=torch.int64) for x in tensors]
    return torch.stack([total * (place + 1) for place, total in enumerate(sums)]).sum()[None]
