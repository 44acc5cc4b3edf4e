"""A thousand drawn calls of `nsa_attention` against the fp64 reference: strides, dtypes, modes, packs, wild numbers.

The blocks that a call chooses are taken over by the fp64 run its numbers are held to, for near ties may be decided
either way; of all that fp32 chooses, at most one row in two hundred may differ from what fp64 would. One call in ten is
made by `make test`, all of them by `make test-all`.
"""

import math
import random
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from kernels.test_strides import LAYOUTS
from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.compress import CompressMLP
from nsa_kernels import cpu, reference

CALLS, PARTS = 1000, 10
CONFIGS = [
    NSAConfig(8, 4, 16, 4, 1, 1, 24),
    NSAConfig(8, 8, 8, 3, 0, 1, 1),
    NSAConfig(4, 2, 8, 2, 1, 1, 9),
    NSAConfig(16, 4, 8, 6, 2, 2, 64),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}  # of the largest number, or of 1


class ChosenBlocks:
    """An operators' module, the fp64 reference with the block choice of another run."""

    def __init__(self, block_indices: Tensor):
        self._chosen = block_indices

    def __getattr__(self, name: str):
        return getattr(reference, name)

    def select_blocks(self, *_, **__) -> Tensor:
        return self._chosen


class Call:
    """One drawn call, and the same in fp64."""

    def __init__(self, number: int):
        self.draw = draw = random.Random(number)
        torch.manual_seed(number)
        self.cfg = draw.choice(CONFIGS)
        self.dtype = draw.choice([torch.float32] * 4 + [torch.bfloat16] * 2 + [torch.float64])
        self.kv_heads, group = draw.choice([(1, 1), (1, 4), (2, 2), (3, 1)])
        self.heads, self.dims = self.kv_heads * group, draw.choice([(8, 8), (16, 8), (4, 12)])
        self.lengths = [draw.choice([1, 3, 7, 8, 16, 17, 31, 40, 64]) for _ in range(draw.choice([1, 1, 2, 3, 5]))]
        bounds = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        self.plan = ShardPlan.contiguous(bounds, 1, self.cfg.slc_block_len) if draw.random() < 0.5 else None
        self.position = (self.plan or ShardPlan.contiguous(bounds, 1, 1)).positions(0)
        self.bounds, self.mode = bounds, draw.choice(["plain", "autocast", "inference first"])
        self.sick = draw.choice([None, None, "padding", "document"])
        self.wild = draw.choice([math.nan, math.inf, -math.inf, 1e30])
        self.phi = draw.choice(["mlp", "mean", "callable"])

    def tensors(self) -> list[Tensor]:
        dim_k, dim_v = self.dims
        shapes = [(self.heads, dim_k), *[(self.kv_heads, dim_k), (self.kv_heads, dim_v)] * 3, (self.heads, 3)]
        drawn = [torch.randn(len(self.position), *s, dtype=torch.float64).to(self.dtype) for s in shapes]
        drawn[-1] = drawn[-1].sigmoid()
        return [*drawn, torch.randn(len(self.position), self.heads, dim_v, dtype=torch.float64).to(self.dtype)]

    def healthy(self) -> Tensor:
        """Tokens whose results are held to fp64: all real ones that the wild numbers do not belong to."""
        real = self.position >= 0
        return real & (self.position < self.bounds[-2]) if self.sick == "document" and len(self.bounds) > 2 else real

    def poisoned(self, x: Tensor) -> Tensor:
        where = {"padding": self.position < 0, "document": ~self.healthy()}.get(self.sick or "")
        if where is None or (self.sick == "document" and len(self.bounds) == 2):
            return x
        return x.masked_fill(where[:, None, None], self.wild)

    def run(self, leaves: list[Tensor], upstream: Tensor, phis, ops):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, ids = nsa_attention(
            leaves[0], BranchKV(*leaves[1:7]), leaves[7], self.cfg, compress_k=phis[0], compress_v=phis[1],
            plan=self.plan, cu_seqlens=None if self.plan else torch.tensor(self.bounds, dtype=torch.int32),
            ops=ops, return_block_indices=True,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)], ids

    def phis(self):
        if self.phi == "mean":
            return [(None, None)] * 2
        if self.phi == "callable":
            return [(lambda blocks, start: blocks[:, 0] - 2 * blocks[:, -1],) * 2] * 2
        given = [CompressMLP(self.kv_heads, dim, self.cfg.cmp_block_len, 8).to(self.dtype) for dim in self.dims]
        exact = [CompressMLP(self.kv_heads, dim, self.cfg.cmp_block_len, 8).double() for dim in self.dims]
        for mine, wide in zip(given, exact, strict=True):
            wide.load_state_dict({name: x.double() for name, x in mine.state_dict().items()})
        return [given, exact]


def hold(number: int) -> tuple[int, int]:
    """Assert one call's results; the rows of blocks it chose in fp32, and of how many fp64 would choose others."""
    call = Call(number)
    values = [call.poisoned(x) for x in call.tensors()]
    given = [call.draw.choice([*LAYOUTS[:5], lambda x: x])(x) for x in values]
    phis, exact_phis = call.phis()
    ops = None if call.dtype == torch.float64 else call.draw.choice([cpu, reference, None])
    if call.mode == "inference first":
        with torch.inference_mode():
            nsa_attention(given[0], BranchKV(*given[1:7]), given[7], call.cfg, plan=call.plan, cu_seqlens=call.bounds)
    with torch.autocast("cpu", torch.bfloat16) if call.mode == "autocast" else nullcontext():
        found, ids = call.run(given[:8], given[8], phis, ops)
    healthy = call.healthy()
    # What the others hold cannot matter: in the fp64 run they are plain zeros.
    tame = [x.double().masked_fill(~healthy[:, None, None], 0) for x in values]
    stream = ShardPlan.contiguous(call.bounds, 1, call.cfg.slc_block_len)
    chosen = ids if call.plan else stream.shard(ids + 1, 0) - 1
    wanted, _ = call.run(tame[:8], tame[8], exact_phis, ChosenBlocks(chosen.contiguous()))
    for what, mine, exact in zip(["out", "q", *BranchKV._fields, "gates"], found, wanted, strict=True):
        mine, exact = mine[healthy].double(), exact[healthy]
        error = (mine - exact).abs().max() / exact.abs().max().clamp(min=1) if len(exact) else torch.tensor(0.0)
        assert error <= TOLERANCE[call.dtype], f"call {number}: {what} is off by {float(error):.2e}: {vars(call)}"
    if call.dtype != torch.float32:
        return 0, 0
    _, exact_ids = call.run(tame[:8], tame[8], exact_phis, reference)
    differ = (ids != exact_ids)[healthy].any(-1)
    return differ.numel(), int(differ.sum())


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, PARTS))])
def test_drawn_calls(part):
    rows, differ = (sum(counts) for counts in zip(*(hold(number) for number in range(part, CALLS, PARTS)), strict=True))
    assert rows > 1000
    assert differ <= rows / 200
