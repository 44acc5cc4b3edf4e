"""The `ModuleSpec` that puts NSA, or its dense twin, into a Megatron model."""

from importlib.util import find_spec
from typing import Any, Literal

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import transformer_block
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nsa_dist.mcore.attention import NSASelfAttention, NSASelfAttentionSubmodules
from nsa_dist.mcore.config import NSATransformerConfig, need_nsa_config
from nsa_dist.mcore.dense import DenseSelfAttention
from nsa_dist.mcore.norm import local_norm
from nsa_dist.mcore.plans import PlanCache

Backend = Literal["local", "transformer_engine"]

# What Megatron's torch norm refuses, with a bare assertion when a model builds its final norm.
_TORCH_NORM_REFUSES = (
    "sequence_parallel",
    "layernorm_zero_centered_gamma",
    "persist_layer_norm",
    "memory_efficient_layer_norm",
)


def nsa_layer_spec(config: NSATransformerConfig, backend: Backend = "local") -> ModuleSpec:
    """A GPT transformer layer whose self-attention is NSA: `GPTModel(config, nsa_layer_spec(config), ...)`.

    With `config.nsa_attention="dense"` it is the dense twin; a pattern of both needs `nsa_block_spec`.

    backend     "local": Megatron-core alone, on any device; "transformer_engine": its linear layers and norms.
    ValueError for another backend, another config, a pattern, or a mixture of MoE and other layers. With a bare layer's
    spec Megatron chooses the final norm: under sequence parallelism and without Transformer Engine, building such a
    layer is a ValueError that names `nsa_block_spec`.
    """
    need_nsa_config(config, "nsa_layer_spec")
    kinds = set(config.layer_attentions)
    if len(kinds) > 1:
        raise ValueError(
            f"nsa_attention={config.nsa_attention!r} has layers of both kinds, but nsa_layer_spec is the spec of one "
            f"layer, which a model repeats; pass nsa_block_spec(config) to the model"
        )
    layer = _layer_spec(config, backend, kinds.pop(), PlanCache(config))
    refused = [name for name in _TORCH_NORM_REFUSES if getattr(config, name)]
    if backend == "local" and refused and transformer_block.LayerNormImpl is WrappedTorchNorm:
        layer.submodules.input_layernorm = ModuleSpec(module=_NoFinalNorm, params={"refused": refused})
    return layer


def nsa_block_spec(config: NSATransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, fit for sequence parallelism without Transformer Engine.

    Layers are NSA or dense as `config.nsa_attention` says. From a bare layer spec Megatron would build a final norm
    that refuses sequence parallelism. ValueError as `nsa_layer_spec`, but for patterns.
    """
    need_nsa_config(config, "nsa_block_spec")
    plans, kinds = PlanCache(config), config.layer_attentions
    specs = {kind: _layer_spec(config, "local", kind, plans) for kind in set(kinds)}
    first = get_transformer_layer_offset(config, vp_stage) if len(specs) > 1 else 0
    here = kinds[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in here], layer_norm=local_norm(config))


def _layer_spec(config: NSATransformerConfig, backend: Backend, attention: str, plans: PlanCache) -> ModuleSpec:
    experts = {"num_experts": _experts_of_every_layer(config), "moe_grouped_gemm": config.moe_grouped_gemm}
    if backend == "local":
        layer = get_gpt_layer_local_spec(normalization=config.normalization, **experts)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = local_norm(config)
    elif backend == "transformer_engine":
        if find_spec("transformer_engine") is None:
            raise ValueError(
                "backend='transformer_engine' needs Transformer Engine, which is not installed, for its linear layers "
                "and norms; install transformer-engine, or use backend='local'"
            )
        layer = get_gpt_layer_with_transformer_engine_spec(**experts)
    else:
        raise ValueError(
            f"backend={backend!r} must be 'local' or 'transformer_engine', as those are Megatron's two sets of linear "
            f"layers; use 'local' where Transformer Engine is not installed"
        )
    dense = layer.submodules.self_attention.submodules
    layer.submodules.self_attention = ModuleSpec(
        module=NSASelfAttention if attention == "nsa" else DenseSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "plans": plans},
        submodules=NSASelfAttentionSubmodules(linear_qkv=dense.linear_qkv, linear_proj=dense.linear_proj),
    )
    return layer


def _experts_of_every_layer(config: NSATransformerConfig) -> int | None:
    frequency = config.moe_layer_freq
    if config.num_moe_experts is not None and frequency != 1 and list(_as_list(frequency)) != [1] * config.num_layers:
        raise ValueError(
            f"moe_layer_freq={frequency!r} makes some layers dense and some of experts, but all layers of this spec "
            f"are alike; set moe_layer_freq=1, or put TransformerBlockSubmodules together from layers of two configs"
        )
    return config.num_moe_experts


def _as_list(frequency: int | list[int]) -> list[int]:
    return frequency if isinstance(frequency, list) else []


class _NoFinalNorm:
    """Stands where a layer's first norm would, in a model whose final norm Megatron could not build."""

    def __init__(self, config: TransformerConfig, hidden_size: int, refused: list[str], **unused: Any) -> None:
        settings = ", ".join(f"{name}={getattr(config, name)}" for name in refused)
        raise ValueError(
            f"nsa_layer_spec was given {settings}, but the final norm that Megatron adds to a bare layer spec without "
            f"Transformer Engine cannot do that; pass nsa_block_spec(config) to the model, which brings its own"
        )
