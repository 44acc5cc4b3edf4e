"""The `ModuleSpec` that puts NSA into a Megatron model."""

from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nsa_dist.mcore.attention import NSASelfAttention, NSASelfAttentionSubmodules
from nsa_dist.mcore.config import NSATransformerConfig
from nsa_dist.mcore.norm import RMSNorm
from nsa_dist.mcore.plans import PlanCache

Backend = Literal["local", "transformer_engine"]


def nsa_layer_spec(config: NSATransformerConfig, backend: Backend = "local") -> ModuleSpec:
    """A GPT transformer layer whose self-attention is NSA: `GPTModel(config, nsa_layer_spec(config), ...)`.

    backend     "local": Megatron-core alone, on any device; "transformer_engine": its linear layers and norms.
    ValueError for another backend. With sequence parallelism and no Transformer Engine pass `nsa_block_spec` instead.
    """
    if backend == "local":
        layer = get_gpt_layer_local_spec(normalization=config.normalization)
        if config.normalization == "RMSNorm":
            layer.submodules.input_layernorm = RMSNorm
            layer.submodules.pre_mlp_layernorm = RMSNorm
    elif backend == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec()
    else:
        raise ValueError(
            f"backend={backend!r} must be 'local' or 'transformer_engine', as those are Megatron's two sets of linear "
            f"layers; use 'local' where Transformer Engine is not installed"
        )
    dense = layer.submodules.self_attention.submodules
    layer.submodules.self_attention = ModuleSpec(
        module=NSASelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "plans": PlanCache(config),
        },
        submodules=NSASelfAttentionSubmodules(linear_qkv=dense.linear_qkv, linear_proj=dense.linear_proj),
    )
    return layer


def nsa_block_spec(config: NSATransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, fit for sequence parallelism without Transformer Engine.

    From a bare layer spec Megatron would build a final norm that refuses sequence parallelism.
    """
    layer = nsa_layer_spec(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm
    )
