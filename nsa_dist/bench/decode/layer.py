"""A cache with drawn contents, and a step of decoding from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.bench.decode.case import DecodeCase
from nsa_dist.branches import BranchKV
from nsa_dist.compress import CompressMLP
from nsa_dist.inference.attend import nsa_decode
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.decode import decode_step, has_kernels, paged, sizes_of, slots_of
from nsa_dist.operators import default_ops
from nsa_kernels.decode_contracts import Appended
from nsa_kernels.reference import decode as reference


@dataclass
class Layer:
    """One layer of `case`: what is in its cache is drawn, its pages lie in no order. It lacks one token of the case."""

    case: DecodeCase
    cache: NSACache
    seqs: list[int]
    q: Tensor
    kv: BranchKV
    gates: Tensor
    answer: tuple[Tensor, Tensor] | None = None  # of the call that was checked

    @classmethod
    def of(cls, case: DecodeCase, device: torch.device, seed: int = 0) -> "Layer":
        torch.manual_seed(seed)
        num_q_heads, num_heads, dim_k, dim_v = case.heads
        dtype, batch = case.torch_dtype, case.batch
        phis = [CompressMLP(num_heads, dim, case.cfg.cmp_block_len) for dim in (dim_k, dim_v)]
        phi_k, phi_v = (phi.to(device, dtype).requires_grad_(False) for phi in phis)
        cache = NSACache(
            case.cfg, num_heads, dim_k, dim_v, batch * case.pages, dtype=dtype, device=device, compress_k=phi_k,
            compress_v=phi_v, max_sequences=batch, max_tokens=case.pages * case.cfg.slc_block_len,
            page_dtype=case.page_dtype,
        )  # fmt: skip
        seqs = [cache.new_sequence() for _ in range(batch)]
        _fill(cache, seqs, case)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(batch, 1, *shape, device=device).to(dtype)

        kv = BranchKV(*(drawn(num_heads, dim_v if name[0] == "v" else dim_k) for name in BranchKV._fields))
        return cls(case, cache, seqs, drawn(num_q_heads, dim_k), kv, torch.sigmoid(drawn(num_q_heads, 3)))

    @property
    def has_kernels(self) -> bool:
        return has_kernels(default_ops(self.q), self.cache)

    def tables(self) -> Tensor:
        """Slots of the sequences; the tables on the device say what the cache holds."""
        self.cache.tables.tell([self.cache.state(seq) for seq in self.seqs], self.cache.storage.num_rings)
        return slots_of(self.cache, self.seqs)

    def step(self, slots: Tensor, with_phi: bool = True) -> tuple[Tensor, Tensor]:
        """The launches of one new token a sequence, for which there is room: out and block_indices."""
        return decode_step(self.q, self.kv, self.gates, self.cache, slots, default_ops(self.q), with_phi=with_phi)

    def call(self) -> tuple[Tensor, Tensor]:
        """The same as users call it. The sequences are longer by a token afterwards."""
        found = nsa_decode(self.q, self.kv, self.gates, self.cache, self.seqs, return_block_indices=True)
        assert isinstance(found, tuple)
        return found

    def expected(self, slots: Tensor, which: list[int]) -> tuple[Tensor, Tensor]:
        """The reference's of some sequences, after a call."""
        index = torch.tensor(which, device=self.q.device)
        q, gates, slots = self.q[index], self.gates[index], slots[index]
        ends = torch.full_like(slots, self.cache.length(self.seqs[0]))
        none = self.q.new_empty(0)
        appended = Appended(ends, none, none, none, none, none)
        return reference.decode_attention(
            q, gates, appended, paged(self.cache), slots,
            sizes=sizes_of(self.cache.shape), softmax_scale=self.q.shape[-1] ** -0.5,
        )  # fmt: skip


def _fill(cache: NSACache, seqs: list[int], case: DecodeCase) -> None:
    room = [case.pages * case.cfg.slc_block_len] * len(seqs)
    with cache.appending(seqs, room) as states:
        pass
    order = torch.cat([state.pages for state in states])[torch.randperm(sum(len(state.pages) for state in states))]
    for state, pages in zip(states, order.chunk(len(states)), strict=True):
        state.pages = pages.clone()
        state.length = state.longest = case.tokens - 1
    for x in (*cache.storage.slc, *cache.storage.cmp, *cache.storage.win, *cache.storage.raw):
        if x.itemsize == 1:
            for some in x.split(1024):  # the same numbers, rounded
                some.copy_(torch.empty_like(some, dtype=case.torch_dtype).normal_())
        else:
            for some in x.split(1024):
                some.normal_()
