"""The stack spec that makes every `*` of a HybridModel's pattern an NSA layer. Needs Megatron-core 0.19 or later."""

from typing import Any, NoReturn

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from nsa_dist.mcore.config import NSATransformerConfig, need_nsa_config
from nsa_dist.mcore.norm import local_norm
from nsa_dist.mcore.plans import PlanCache
from nsa_dist.mcore.specs import LayerKind, layer_spec


def nsa_stack_spec(config: NSATransformerConfig) -> ModuleSpec:
    """`HybridModel(config, nsa_stack_spec(config), ..., hybrid_layer_pattern="*-*-", position_embedding_type="none")`.

    Of Megatron-core alone, without Transformer Engine. A pattern has `*` (NSA), `-` (MLP), `E` (experts), `|` between
    pipeline stages and `/` before the layers of multi-token prediction. Any other layer is a ValueError when the model
    is built: Megatron-core has them with Transformer Engine alone, dense attention among them.
    """
    need_nsa_config(config, "nsa_stack_spec")
    if config.nsa_attention != "nsa":
        raise ValueError(
            f"nsa_attention={config.nsa_attention!r} asks for dense layers, but a pattern of HybridModel has one sign "
            f"(*) for attention, and here it is NSA; leave nsa_attention='nsa', or take GPTModel with "
            f"nsa_block_spec(config)"
        )
    layer = layer_spec(config, "local", LayerKind("nsa", experts=False), PlanCache(config)).submodules
    norms = layer.sharded_state_dict_keys_map
    stack = HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=layer.input_layernorm,
                self_attention=layer.self_attention,
                self_attn_bda=layer.self_attn_bda,
                sharded_state_dict_keys_map=norms,
            ),
        ),
        mlp_layer=_mlp(MLPLayer, layer),
        mtp_block_spec=_mtp(config),
        **{name: _not_here(sign) for name, sign in _ELSEWHERE.items()},
    )
    if config.num_moe_experts is not None:
        experts = layer_spec(config, "local", LayerKind("nsa", experts=True), PlanCache(config)).submodules
        stack.moe_layer = _mlp(MoETransformerLayer, experts)
    return ModuleSpec(module=NSAHybridStack, submodules=stack)


class NSAHybridStack(HybridStack):
    """Megatron's stack with a final norm that needs no Transformer Engine."""

    def __init__(self, config: NSATransformerConfig, submodules: HybridStackSubmodules, **arguments: Any) -> None:
        has_norm = arguments.pop("post_layer_norm", True)
        super().__init__(config, submodules, post_layer_norm=False, **arguments)
        self.post_layer_norm = has_norm
        if self.post_process and has_norm:
            self.final_norm = local_norm(config)(config, config.hidden_size, config.layernorm_epsilon)


# Layers of other kinds, and their sign in a pattern.
_ELSEWHERE = {"mamba_layer": "M", "gdn_layer": "G", "dsa_layer": "D", "mla_layer": "+", "moe_layer": "E"}


def _mlp(module: type, layer: TransformerLayerSubmodules) -> ModuleSpec:
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=layer.pre_mlp_layernorm,
            mlp=layer.mlp,
            mlp_bda=layer.mlp_bda,
            sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
        ),
    )


def _mtp(config: NSATransformerConfig) -> ModuleSpec:
    """Norms and the projection; the layers are those of the pattern."""
    norm = local_norm(config)
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            eh_proj=LocalSpecProvider().column_parallel_linear(),
            mtp_model_layer=None,
            layer_norm=norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )


def _not_here(sign: str) -> ModuleSpec:
    return ModuleSpec(module=_Missing, params={"sign": sign})


class _Missing:
    """What Megatron would pass over in silence: a layer of the pattern that the stack has no spec of."""

    def __init__(self, config: NSATransformerConfig, sign: str, **unused: Any) -> NoReturn:
        needed = "num_moe_experts set" if sign == "E" else "Megatron's own layers, which Transformer Engine brings"
        raise ValueError(
            f"hybrid_layer_pattern has {sign!r}, but that needs {needed}: this stack is of NSA layers (*), MLPs (-) "
            f"and experts (E) without it; write the pattern of these, or a stack spec of your own around "
            f"nsa_layer_spec(config)"
        )
