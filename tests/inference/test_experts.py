"""Experts of a plain model: given to tokens, all at once as launches, and token by token."""

import pytest
import torch

from nsa_dist import NSAConfig
from nsa_dist.inference.model import GPT, Experts, GatedMLP, GPTConfig

SIZES = NSAConfig(cmp_block_len=8, cmp_stride=4, slc_block_len=16, num_slc_blocks=4, window_len=20)


def config(**changes) -> GPTConfig:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8, "nsa": SIZES}
    return GPTConfig(**{**sizes, "ffn_hidden_size": 24, "num_experts": 5, "moe_router_topk": 2, **changes})


@pytest.mark.parametrize("shared", [None, 12])
@pytest.mark.parametrize("pre_softmax", [True, False])
def test_each_token_has_its_experts(shared, pre_softmax):
    torch.manual_seed(1)
    given = config(moe_router_pre_softmax=pre_softmax, moe_shared_expert_intermediate_size=shared)
    mlp = GPT(given).layers[0].mlp
    assert isinstance(mlp, Experts)
    x = torch.randn(3, 7, 16)
    expected = torch.empty_like(x)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(7)).tolist():
        token = x[*place]
        logits = mlp.router(token)
        best = logits.argsort(descending=True)[:2]
        weights = logits.softmax(0)[best] if pre_softmax else logits[best].softmax(0)
        total = torch.zeros(16) if mlp.shared is None else mlp.shared(token)
        for weight, expert in zip(weights, best.tolist(), strict=True):
            total = total + weight * mlp.experts[expert](token)
        expected[*place] = total
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(mlp.in_line(x), expected)


def test_layers_of_both_kinds():
    kinds = [type(layer.mlp) for layer in GPT(config(moe_layer_freq=[0, 1])).layers]
    assert kinds == [GatedMLP, Experts]
    assert {type(layer.mlp) for layer in GPT(config(num_experts=None)).layers} == {GatedMLP}


@pytest.mark.parametrize("changes", [{"moe_layer_freq": [1]}, {"moe_router_topk": 6}, {"moe_router_topk": 0}])
def test_a_folder_that_says_no_layers_is_refused(changes):
    with pytest.raises(ValueError, match=r"a number for each of 2 layers.*export the run again"):
        GPTConfig.of_json({**config().as_json(), **changes})
