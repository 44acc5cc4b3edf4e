"""`nsa_attention` in a compiled graph: one operator, the results of the eager call, forward and backward."""

import pytest
import torch

from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.compress import CompressMLP
from nsa_kernels import reference

CONFIG = NSAConfig(8, 4, 16, 4, 1, 2, 20)


def inputs(num_tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, gates and the six of keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 8), (4, 3), *[(2, 8), (2, 4)] * 3]
    return [torch.randn(num_tokens, *shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def layer(given, phis, **options):
    q, gates, *kv = given
    return nsa_attention(q, BranchKV(*kv), gates, CONFIG, compress_k=phis[0], compress_v=phis[1], **options)


def new_phis(with_phi: bool) -> tuple:
    return tuple(CompressMLP(2, dim, 8, dtype=torch.float64) for dim in (8, 4)) if with_phi else (None, None)


@pytest.mark.parametrize("with_phi", [True, False], ids=["mlp", "mean"])
@pytest.mark.parametrize("documents", [None, [0, 50, 57, 150]], ids=["one document", "a pack"])
def test_one_graph_with_the_results_of_the_eager_call(with_phi, documents):
    given, phis = inputs(150), new_phis(with_phi)
    plan = None if documents is None else ShardPlan.contiguous(documents, 1, 16)
    rows = given if plan is None else [plan.shard(x.detach(), 0).requires_grad_() for x in given]
    leaves = [*rows, *(p for phi in phis if phi for p in phi.parameters())]

    def loss(*rows):
        out, ids = layer(rows, phis, plan=plan, return_block_indices=True, ops=reference)
        return out.sin().sum(), out, ids

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value, out, ids = function(*rows)
        results.append([out.detach(), ids, *torch.autograd.grad(value, leaves)])
    for number, (expected, found) in enumerate(zip(*results, strict=True)):
        assert torch.equal(expected, found), number


def test_the_operator_keeps_what_torch_asks_of_one():
    q, gates, *kv = inputs(40)
    phi = [p.detach().requires_grad_() for p in new_phis(True)[0].parameters()]
    sizes = [8, 4, 16, 4, 1, 2, 20]
    arguments = (q, kv, gates, phi, [], [0, 22, 40], False, sizes, 0.3, "nsa_kernels.reference")
    torch.library.opcheck(torch.ops.nsa_dist.attention.default, arguments)
