"""The layer of one rank in CUDA graphs: the bits of a replay on new inputs are those of a call."""

import pytest
import torch

from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.compress import CompressMLP

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Plan, (Hq, Hkv, D).
CASES = {
    "one document": (ShardPlan.contiguous([0, 8192], 1), (64, 4, 128)),
    "packed, with tails": (ShardPlan.contiguous([0, 1000, 1031, 2500], 1), (16, 2, 128)),
    "sizes of the plain kernels": (ShardPlan.contiguous([0, 1500], 1), (4, 2, 32)),
}


class Layer(torch.nn.Module):
    def __init__(self, plan: ShardPlan, num_kv_heads: int, dim: int) -> None:
        super().__init__()
        self.plan = plan
        self.phis = torch.nn.ModuleList(
            CompressMLP(num_kv_heads, dim, NSAConfig().cmp_block_len, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        )

    def forward(self, q, gates, *kv):
        phi_k, phi_v = self.phis
        return nsa_attention(q, BranchKV(*kv), gates, NSAConfig(), compress_k=phi_k, compress_v=phi_v, plan=self.plan)


def draw(plan: ShardPlan, heads: tuple[int, int, int], seed: int) -> list[torch.Tensor]:
    """q, gates, the six of K/V."""
    gen = torch.Generator("cuda").manual_seed(seed)
    num_q_heads, num_kv_heads, dim = heads
    shapes = [(num_q_heads, dim), (num_q_heads, 3), *[(num_kv_heads, dim)] * 6]
    tensors = [torch.randn(plan.tokens_per_rank, *s, generator=gen, device="cuda").bfloat16() for s in shapes]
    tensors[1] = tensors[1].sigmoid()
    return [t.requires_grad_() for t in tensors]


def results(layer, inputs: list[torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """out, and the gradients of inputs and parameters."""
    out = layer(*inputs)
    return [t.clone() for t in (out.detach(), *torch.autograd.grad(out, [*inputs, *parameters], upstream(out)))]


def upstream(out: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(7)
    return torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)


def differing(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[int]:
    """Which results differ in any bit: 0 is out, 1 the gradient of q, and so on."""
    return [i for i, pair in enumerate(zip(found, expected, strict=True)) if not torch.equal(*pair)]


@pytest.mark.parametrize(("plan", "heads"), CASES.values(), ids=CASES.keys())
def test_graphed_callables_repeat_the_eager_bits(plan, heads):
    torch.manual_seed(0)
    layer = Layer(plan, *heads[1:])
    parameters = list(layer.parameters())
    expected = {seed: results(layer, draw(plan, heads, seed), parameters) for seed in (1, 2)}
    graphed = torch.cuda.make_graphed_callables(layer, tuple(draw(plan, heads, 0)))
    for seed in (1, 2, 1):
        assert differing(results(graphed, draw(plan, heads, seed), parameters), expected[seed]) == []


def test_one_graph_of_forward_and_backward():
    """As a training step is captured: static inputs, gradients in the graph's own memory."""
    plan, heads = CASES["one document"]
    torch.manual_seed(0)
    layer = Layer(plan, *heads[1:])
    parameters, static = list(layer.parameters()), draw(plan, heads, 0)
    expected = results(layer, draw(plan, heads, 1), parameters)
    grad_out = upstream(expected[0])

    def step() -> list[torch.Tensor]:
        out = layer(*static)
        return [out.detach(), *torch.autograd.grad(out, [*static, *parameters], grad_out)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for target, source in zip(static, draw(plan, heads, 1), strict=True):
            target.copy_(source)
    graph.replay()
    assert differing(captured, expected) == []
