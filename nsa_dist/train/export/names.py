"""What Megatron-core calls the weights of a model, and what `nsa_dist.inference.model.GPT` calls them."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nsa_dist.inference.model import GPTConfig
from nsa_dist.train.config import END_OF_DOCUMENT, ModelSection, TrainConfig
from nsa_dist.train.tokens.sets import padded_vocab_size, read_all

_WHOLE = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "output_layer.weight": "output.weight",
}
_OF_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attention.linear_qkv.weight": "attention.qkv.weight",
    "self_attention.linear_proj.weight": "attention.proj.weight",
    "self_attention.q_layernorm": "attention.q_norm",
    "self_attention.k_layernorm": "attention.k_norm",
    "self_attention.core_attention.gate": "attention.gate",
    "self_attention.core_attention.compress_k": "attention.compress_k",
    "self_attention.core_attention.compress_v": "attention.compress_v",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp.linear_fc1.weight": "mlp.up.weight",
    "mlp.linear_fc2.weight": "mlp.down.weight",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.shared_experts.linear_fc1.weight": "mlp.shared.up.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared.down.weight",
}
_OF_EXPERT = {"linear_fc1.weight": "up.weight", "linear_fc2.weight": "down.weight"}


def plain_config(config: TrainConfig) -> GPTConfig:
    """The sizes of a run's model. Refused where the token sets that its vocabulary is of are gone."""
    model, nsa = config.model, config.nsa
    tokens = read_all(config.data)[0] if config.data.token_sets else None
    return GPTConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_q_heads=model.num_attention_heads,
        num_kv_heads=model.num_query_groups,
        head_dim=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        nsa=nsa.sizes(),
        vocab_size=padded_vocab_size(config),
        shared_kv=nsa.shared_kv,
        compression=nsa.compression,
        compress_before_rope=nsa.compress_before_rope,
        rotary_base=nsa.rotary_base,
        rotary_percent=nsa.rotary_percent,
        rope_scaling=nsa.rope_scaling,
        no_rope=config.no_rope,
        qk_norm=model.qk_norm,
        gate_bias=nsa.gate_bias,
        norm_eps=model.norm_eps,
        tie_embeddings=model.tie_embeddings,
        **_experts(model),
        dtype=config.run.dtype,
        tokenizer="bytes" if tokens is None else tokens.tokenizer["kind"],
        end_of_document=END_OF_DOCUMENT if tokens is None else tokens.end_of_document,
        sequence_length=config.run.sequence_length,
    )


def _experts(model: ModelSection) -> dict[str, Any]:
    """Each width in the one way to say it, so that models are compared by these values."""
    if not model.has_experts:
        return {}
    return {
        "num_experts": model.num_experts,
        "moe_layer_freq": [int(has_experts) for has_experts in model.layers_with_experts],
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_ffn_hidden_size": model.expert_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
    }


def plain_weights(megatron: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole Megatron model's weights by our names. ValueError for one that has no place here."""
    return {plain_name(name): x for name, x in megatron.items() if isinstance(x, Tensor)}


def plain_name(name: str) -> str:
    """Ours of Megatron's. ValueError for a weight that has no place here."""
    if name in _WHOLE:
        return _WHOLE[name]
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if found:
        if expert := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)", found[2]):
            return f"blocks.{found[1]}.mlp.experts.{expert[1]}.{_OF_EXPERT[expert[2]]}"
        for theirs, ours in _OF_LAYER.items():
            if found[2] == theirs or found[2].startswith(f"{theirs}."):
                return f"blocks.{found[1]}.{ours}{found[2][len(theirs) :]}"
    raise ValueError(
        f"the weight {name} has no place in the plain model, which is that of nsa_dist.train: RMSNorm, gated MLPs, no "
        f"biases; export a run of nsa-dist train"
    )
