"""The GPT model of a configuration, with Megatron's data parallelism, optimizer and learning-rate schedule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nsa_dist.mcore import NSASelfAttention, NSATransformerConfig, nsa_block_spec, nsa_mtp_spec
from nsa_dist.mcore.specs import layer_kinds
from nsa_dist.rope_scaling import scaling_of
from nsa_dist.train.config import ModelSection, OptimizerSection, TrainConfig
from nsa_dist.train.experts.router import SampleRouter, route_by_samples
from nsa_dist.train.mtp.gpt import PredictingGPT, inner_layer, layers_of
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens.sets import padded_vocab_size
from nsa_dist.train.world import World


@dataclass(frozen=True)
class Trainable:
    """What a step needs of the model, and a checkpoint of all of it."""

    config: NSATransformerConfig
    module: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def bare_model(self) -> GPTModel:
        """The model without the wrappers of data parallelism and mixed precision."""
        inner = self.module.module
        return inner.module if isinstance(inner, Float16Module) else inner

    @property
    def attentions(self) -> dict[int, NSASelfAttention]:
        """Those of this stage's layers that have NSA, by layer from 0: a dense one chooses no blocks and sends nothing.

        Layers of multi-token prediction are counted behind the decoder's.
        """
        found = {n: layer.self_attention for n, layer in layers_of(self.bare_model).items()}
        return {n: attention for n, attention in found.items() if isinstance(attention, NSASelfAttention)}

    @property
    def routers(self) -> dict[int, SampleRouter]:
        """Those of this stage's layers that have experts, by layer from 0."""
        found = {n: getattr(layer.mlp, "router", None) for n, layer in layers_of(self.bare_model).items()}
        return {layer: router for layer, router in found.items() if router is not None}


def build(config: TrainConfig, world: World, fill: Callable[[GPTModel], None] | None = None) -> Trainable:
    """Called inside `world.entered`, on every process; `fill` may change the weights before anything copies them."""
    megatron, model = bare_model(config, world)
    if fill is not None:
        fill(model)
    inner = Float16Module(megatron, model) if megatron.bf16 else model
    # Gradients that are not finite are found by their norm: `health.finite`. Megatron's own check ends the process.
    module = DistributedDataParallel(
        megatron, DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=False), inner
    )
    module.broadcast_params()
    optimizer = get_megatron_optimizer(_optimizer_config(config.optimizer, megatron), [module])
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.grad_scale_func = optimizer.scale_loss
    return Trainable(megatron, module, optimizer, _schedule(config, optimizer))


def bare_model(config: TrainConfig, world: World) -> tuple[NSATransformerConfig, GPTModel]:
    """This stage's part of the model on its device, without wrappers, and Megatron's configuration of it."""
    megatron, spec, mtp_spec = _layers(config, world)
    model = (GPTModel if config.model.mtp_num_layers is None else PredictingGPT)(
        config=megatron,
        transformer_layer_spec=spec,
        mtp_block_spec=mtp_spec,
        vocab_size=padded_vocab_size(config),
        max_sequence_length=config.run.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="none",  # the attention turns its own queries and keys
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        parallel_output=True,
    )
    model.model_type = ModelType.encoder_or_decoder
    if world.device.type == "cuda":
        model.cuda(world.device)
    return megatron, model


def _layers(config: TrainConfig, world: World) -> tuple[NSATransformerConfig, Any, Any]:
    """Megatron's configuration, the layers' spec, and that of multi-token prediction, None where this stage has none.

    Refused where one refuses the other's sizes.
    """
    try:
        megatron = transformer_config(config, world)
        block, mtp = nsa_block_spec(megatron), nsa_mtp_spec(megatron)
    except ValueError as error:
        raise Refused(str(error)) from error
    first, has_experts = get_transformer_layer_offset(megatron), config.model.layers_with_experts
    layers = list(zip(block.layer_specs, has_experts[first:], strict=False))
    if mtp is not None:
        layers.append((inner_layer(mtp.layer_specs[0].submodules), has_experts[-1]))  # one spec for all of them
    for layer, with_experts in layers:
        if with_experts:
            route_by_samples(layer)
    return megatron, block, mtp


def transformer_config(config: TrainConfig, world: World) -> NSATransformerConfig:
    """Megatron's configuration of the model and its parallelism."""
    model, nsa, parallel = config.model, config.nsa, config.parallel
    dtype = torch.bfloat16 if config.run.dtype == "bf16" else torch.float32
    recompute: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    stretch, scaling = scaling_of(nsa.rope_scaling)
    return NSATransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        init_method_std=model.init_std,
        embedding_init_method_std=model.embedding_init_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=config.run.dtype == "bf16",
        # The mean over the tokens of all ranks: a mean of the ranks' means would weigh tokens unequally.
        calculate_per_token_loss=True,
        use_cpu_initialization=world.device.type == "cpu",
        nsa=nsa.sizes(),
        nsa_attention=model.attention,
        nsa_shared_kv=nsa.shared_kv,
        nsa_compression=nsa.compression,
        nsa_compress_before_rope=nsa.compress_before_rope,
        nsa_rotary_base=nsa.rotary_base,
        rotary_percent=nsa.rotary_percent,
        rotary_seq_len_interpolation_factor=None if stretch == 1 else stretch,
        nsa_rope_scaling=scaling,
        nsa_gate_bias=nsa.gate_bias,
        no_rope_freq=config.no_rope,
        qk_layernorm=model.qk_norm == "rms",
        qk_l2_norm=model.qk_norm == "l2",
        layernorm_epsilon=model.norm_eps,
        nsa_layout=parallel.layout,
        nsa_pack_order=parallel.pack_order,
        nsa_fetch=parallel.fetch_options(),
        mtp_num_layers=model.mtp_num_layers,
        **(recompute if model.recompute_attention else {}),
        **_experts(model),
    )


def _experts(model: ModelSection) -> dict[str, Any]:
    """Megatron's names for layers of experts; without any its defaults."""
    if not model.has_experts:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": [int(has_experts) for has_experts in model.layers_with_experts],
        "moe_ffn_hidden_size": model.expert_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_token_dispatcher_type": "allgather",
    }


def sharding_metadata(config: NSATransformerConfig) -> dict[str, Any]:
    """What Megatron's `sharded_state_dict` is told. Weights of layers of two kinds cannot be stacked."""
    both = len(set(layer_kinds(config))) > 1
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"dp_cp_group": group, **({"non_homogeneous_layers": True} if both else {})}


def _optimizer_config(section: OptimizerSection, megatron: NSATransformerConfig) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=megatron.bf16,
        params_dtype=megatron.params_dtype,
        use_distributed_optimizer=False,
    )


def _schedule(config: TrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    section = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=section.lr / (section.warmup_steps + 1),  # the first step is a step, too
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=config.run.steps,
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=config.run.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows its own configuration
    )
