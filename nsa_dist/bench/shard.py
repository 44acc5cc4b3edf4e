"""One rank's shard of random inputs, and the selection drawn for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.attention import BranchKV
from nsa_dist.bench.case import Case
from nsa_dist.bench.selection import Draw, draw_selection
from nsa_dist.compress import CompressMLP


@dataclass(frozen=True)
class Shard:
    """What one rank holds: q, keys and values, gates, the two phi, and the gradient of the output.

    Of keys and values there are six, or two that stand in `kv` three times.
    """

    q: Tensor
    kv: BranchKV
    gates: Tensor
    phi: tuple[CompressMLP, CompressMLP]
    grad_out: Tensor

    @property
    def kv_leaves(self) -> dict[str, Tensor]:
        """Keys and values by name, each once."""
        if self.kv.k_slc is self.kv.k_cmp:
            return {"k": self.kv.k_cmp, "v": self.kv.v_cmp}
        return self.kv._asdict()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, *self.kv_leaves.values(), self.gates, *(p for phi in self.phi for p in phi.parameters())]


def make_shard(case: Case, num_tokens: int, device: torch.device, seed: int) -> Shard:
    """Normal numbers; gates are sigmoids of such, phi an MLP as wide as the head, the same for every seed."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, dtype = case.heads, case.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    dims = [heads.dim_v if name.startswith("v") else heads.dim_k for name in BranchKV._fields]
    q = normal(num_tokens, heads.num_q_heads, heads.dim_k)
    drawn_kv = [normal(num_tokens, heads.num_kv_heads, dim) for dim in (dims[:2] if case.shared_kv else dims)]
    kv = BranchKV(*(drawn_kv * 3 if case.shared_kv else drawn_kv))
    gates = normal(num_tokens, heads.num_q_heads, 3).sigmoid()
    grad_out = normal(num_tokens, heads.num_q_heads, heads.dim_v)
    for x in (q, *kv, gates):
        x.requires_grad_()
    torch.manual_seed(0)
    phi = [
        CompressMLP(heads.num_kv_heads, dim, case.cfg.cmp_block_len, device=device, dtype=dtype)
        for dim in (heads.dim_k, heads.dim_v)
    ]
    return Shard(q, kv, gates, (phi[0], phi[1]), grad_out)


def drawn(case: Case, rank: int, device: torch.device) -> Draw:
    """The selection of a case's rank."""
    plan, heads = case.plan(), case.heads
    return draw_selection(plan, case.cfg, rank, heads.num_kv_heads, case.union_fraction, device)
