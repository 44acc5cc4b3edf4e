"""NSA weights out of dense ones, so that a model begins where the dense one is.

While all blocks are selected, up to `num_slc_blocks * slc_block_len` tokens, the selected branch is dense attention.
The gates are open for it and all but shut for the other two, so that the logits are the dense model's; training opens
them. Every branch begins with the dense keys and values, and phi near the mean of a block.
"""

from typing import Literal

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.convert.dense import DenseModel
from nsa_dist.inference.model import GPT, GPTConfig

# phi's MLP is gelu(s * mean) * 2 / s: for a small s a mean, with an error of 0.8 * s * mean**2.
_NARROW = 2.0**-6
GATE_LOGIT = 14.0  # gates of 8e-7: logits within 1e-4 in fp32; the larger, the smaller are their first gradients


def converted(
    dense: DenseModel,
    nsa: NSAConfig,
    *,
    compression: Literal["mlp", "mean"] = "mlp",
    gate_logit: float = GATE_LOGIT,
) -> GPT:
    """The model, for evaluation or to save.

    gate_logit      of the selected branch at first; the other two have its negative
    """
    sizes = dense._asdict()
    for name in ("weights", "not_read"):
        del sizes[name]
    config = GPTConfig(nsa=nsa, compression=compression, gate_bias=True, **sizes)
    model = GPT(config, "meta")
    weights = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not dense.tie_embeddings:
        weights["output.weight"] = "lm_head.weight"
    state = {ours: dense.weights[theirs] for ours, theirs in weights.items()}
    for layer in range(dense.num_layers):
        state |= {f"blocks.{layer}.{name}": x for name, x in _layer(dense, layer, config, gate_logit).items()}
    model.load_state_dict({name: x.to(config.torch_dtype) for name, x in state.items()}, assign=True)
    return model.requires_grad_(False).eval()


def _layer(dense: DenseModel, layer: int, config: GPTConfig, gate_logit: float) -> dict[str, Tensor]:
    def of(name: str) -> Tensor:
        return dense.weights[f"model.layers.{layer}.{name}.weight"]

    groups, dim = dense.num_kv_heads, dense.head_dim
    q, k, v = (of(f"self_attn.{name}_proj").unflatten(0, (groups, -1)) for name in "qkv")
    gates = q.new_zeros(groups, 3 * dense.num_q_heads // groups, dense.hidden_size)
    bias = torch.tensor([-gate_logit, gate_logit, -gate_logit]).repeat(dense.num_q_heads)
    found = {
        "attention_norm.weight": of("input_layernorm"),
        "attention.qkv.weight": torch.cat([q, k, v, k, v, k, v, gates], 1).flatten(0, 1),
        "attention.gate.bias": bias,
        "attention.proj.weight": of("self_attn.o_proj"),
        "mlp_norm.weight": of("post_attention_layernorm"),
        "mlp.up.weight": torch.cat([of("mlp.gate_proj"), of("mlp.up_proj")]),
        "mlp.down.weight": of("mlp.down_proj"),
    }
    if dense.qk_norm:
        found["attention.q_norm.weight"] = of("self_attn.q_norm")
        found |= {f"attention.k_norm.{branch}.weight": of("self_attn.k_norm") for branch in ("cmp", "slc", "win")}
    if config.compression == "mlp":
        phi = _near_the_mean(groups, dim, config.nsa.cmp_block_len)
        found |= {f"attention.compress_{x}.{name}": weight for x in "kv" for name, weight in phi.items()}
    return found


def _near_the_mean(groups: int, dim: int, block_len: int) -> dict[str, Tensor]:
    """phi's weights: [Hkv, l, D], [Hkv, l * D, D], [Hkv, D, D]."""
    one = torch.eye(dim)
    w1 = (_NARROW / block_len * one).repeat(block_len, 1)
    return {
        "pos_emb": torch.zeros(groups, block_len, dim),
        "w1": w1.repeat(groups, 1, 1),
        "w2": (2 / _NARROW * one).repeat(groups, 1, 1),
    }
