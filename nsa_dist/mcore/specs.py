"""The specs that put NSA, or its dense twin, into a Megatron model: `nsa_block_spec` in every layout, `nsa_layer_spec`
for one layer.
"""

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import transformer_block
from megatron.core.transformer.enums import AttnMaskType, LayerType
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


class LayerKind(NamedTuple):
    attention: str  # "nsa" or "dense"
    experts: bool


# What Megatron's torch norm refuses, with a bare assertion when a model builds its final norm.
_TORCH_NORM_REFUSES = (
    "sequence_parallel",
    "layernorm_zero_centered_gamma",
    "persist_layer_norm",
    "memory_efficient_layer_norm",
)


def nsa_block_spec(
    config: NSATransformerConfig, vp_stage: int | None = None, backend: Backend = "local"
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm: `GPTModel(config, nsa_block_spec(config), ...)`.

    For every layout: sequence parallelism, pipelines, uneven ones and interleaved ones, layers of experts among dense
    ones (`moe_layer_freq`), dense attention beside NSA (`nsa_attention`). Pipeline ranks are those of Megatron's
    `parallel_state`.

    vp_stage    the model chunk of an interleaved pipeline, which has a spec of its own
    backend     "local": Megatron-core alone, on any device; "transformer_engine": its linear layers and norms
    ValueError for another backend or config, or an interleaved pipeline without its `vp_stage`.
    """
    need_nsa_config(config, "nsa_block_spec")
    chunks = config.virtual_pipeline_model_parallel_size
    if vp_stage is None and chunks is not None and chunks > 1:
        raise ValueError(
            f"nsa_block_spec was given vp_stage=None, but virtual_pipeline_model_parallel_size={chunks} cuts a stage "
            f"into chunks with layers of their own; pass vp_stage=0..{chunks - 1}, the same that the model is given"
        )
    plans = PlanCache(config)
    kinds = layer_kinds(config)
    specs = {kind: layer_spec(config, backend, kind, plans) for kind in set(kinds)}
    return TransformerBlockSubmodules(
        layer_specs=[specs[kinds[layer]] for layer in _layers_of_stage(config, vp_stage)],
        layer_norm=local_norm(config) if backend == "local" else _transformer_engine_norm(),
    )


def nsa_layer_spec(config: NSATransformerConfig, backend: Backend = "local") -> ModuleSpec:
    """One GPT transformer layer whose self-attention is NSA, for what wants a layer; a model wants `nsa_block_spec`.

    ValueError for another backend, another config, or layers of more than one kind. With a bare layer's spec Megatron
    chooses the final norm: under sequence parallelism and without Transformer Engine, building such a layer is a
    ValueError that names `nsa_block_spec`.
    """
    need_nsa_config(config, "nsa_layer_spec")
    kinds = set(layer_kinds(config))
    if len(kinds) > 1:
        raise ValueError(
            f"nsa_attention={config.nsa_attention!r} and moe_layer_freq={config.moe_layer_freq!r} make layers of "
            f"{len(kinds)} kinds, but nsa_layer_spec is the spec of one layer, which a model repeats; pass "
            f"nsa_block_spec(config) to the model"
        )
    layer = layer_spec(config, backend, kinds.pop(), PlanCache(config))
    refused = [name for name in _TORCH_NORM_REFUSES if getattr(config, name)]
    if backend == "local" and refused and transformer_block.LayerNormImpl is WrappedTorchNorm:
        layer.submodules.input_layernorm = ModuleSpec(module=_NoFinalNorm, params={"refused": refused})
    return layer


def nsa_mtp_spec(config: NSATransformerConfig, vp_stage: int | None = None, backend: Backend = "local") -> Any:
    """Multi-token prediction by NSA layers, `GPTModel(..., mtp_block_spec=nsa_mtp_spec(config))`.

    They are of the last layer's kind, and have positions whatever `no_rope_freq` says of it.
    None where there is none, in the configuration or on this pipeline stage. Without Transformer Engine its norms are
    those of `nsa_block_spec`, for Megatron's refuse sequence parallelism.
    """
    need_nsa_config(config, "nsa_mtp_spec")
    if not config.mtp_num_layers:
        return None
    layer = layer_spec(config, backend, layer_kinds(config)[-1], PlanCache(config))
    # Their numbers go on from the decoder's in Megatron-core 0.16, and begin again at 1 in 0.19.
    layer.submodules.self_attention.params["has_positions"] = True
    block = get_gpt_mtp_block_spec(
        config,
        TransformerBlockSubmodules(layer_specs=[layer]),
        use_transformer_engine=backend == "transformer_engine",
        vp_stage=vp_stage,
    )
    if block is not None and backend == "local":
        for spec in block.layer_specs:
            spec.submodules.enorm = spec.submodules.hnorm = spec.submodules.layer_norm = local_norm(config)
    return block


def layer_spec(config: NSATransformerConfig, backend: Backend, kind: LayerKind, plans: PlanCache) -> ModuleSpec:
    """A layer of one kind. Layers that are given the same `plans` make each plan once."""
    experts = config.num_moe_experts if kind.experts else None
    moe = {"num_experts": experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if backend == "local":
        layer = get_gpt_layer_local_spec(normalization=config.normalization, **moe)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = local_norm(config)
    elif backend == "transformer_engine":
        if find_spec("transformer_engine") is None:
            raise ValueError(
                "backend='transformer_engine' needs Transformer Engine, which is not installed, for its linear layers "
                "and norms; install transformer-engine, or use backend='local' (Megatron-LM: --transformer-impl local)"
            )
        layer = get_gpt_layer_with_transformer_engine_spec(**moe)
    else:
        raise ValueError(
            f"backend={backend!r} must be 'local' or 'transformer_engine', as those are Megatron's two sets of linear "
            f"layers; use 'local' where Transformer Engine is not installed"
        )
    dense = layer.submodules.self_attention.submodules
    layer.submodules.self_attention = ModuleSpec(
        module=NSASelfAttention if kind.attention == "nsa" else DenseSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "plans": plans},
        submodules=NSASelfAttentionSubmodules(linear_qkv=dense.linear_qkv, linear_proj=dense.linear_proj),
    )
    return layer


def _layers_of_stage(config: NSATransformerConfig, vp_stage: int | None) -> list[int]:
    """Numbers of this rank's layers, from 0."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))


def layer_kinds(config: NSATransformerConfig) -> list[LayerKind]:
    """Of each layer of the model."""
    return [LayerKind(*kind) for kind in zip(config.layer_attentions, _experts_by_layer(config), strict=True)]


def _experts_by_layer(config: NSATransformerConfig) -> list[bool]:
    """Whether each layer of the model has experts."""
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    if len(frequency) != config.num_layers:
        raise ValueError(
            f"moe_layer_freq={frequency!r} speaks of {len(frequency)} layers, but num_layers={config.num_layers}: one "
            f"number a layer says whether it has experts; write {config.num_layers} of them"
        )
    return [bool(experts) for experts in frequency]


def _transformer_engine_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


class _NoFinalNorm:
    """Stands where a layer's first norm would, in a model whose final norm Megatron could not build."""

    def __init__(self, config: TransformerConfig, hidden_size: int, refused: list[str], **unused: Any) -> None:
        settings = ", ".join(f"{name}={getattr(config, name)}" for name in refused)
        raise ValueError(
            f"nsa_layer_spec was given {settings}, but the final norm that Megatron adds to a bare layer spec without "
            f"Transformer Engine cannot do that; pass nsa_block_spec(config) to the model, which brings its own"
        )
