"""Every setting of Megatron's `TransformerConfig`, and what an NSA layer makes of it: one table, no field forgotten.

    HONOURED    the layer or its spec does what the setting says, or Megatron does it around the attention
    REFUSED     the layer would not do it: ValueError for any value but those named here
    IRRELEVANT  says nothing about attention, positions, norms or the MLP of a layer, or only details of what is refused

Of megatron-core 0.16.1 to 0.19.2; `tests/mcore/test_settings.py` fails for a field of the installed one that nobody
decided about.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """The values that the layer accepts, and why no other: completes "..., but ".

    same_as     settings, of which the first that is not None is accepted too
    """

    accepted: tuple[Any, ...]
    why: str
    same_as: tuple[str, ...] = ()

    def accepted_in(self, config: Any) -> tuple[Any, ...]:
        other = next((v for name in self.same_as if (v := getattr(config, name, None)) is not None), None)
        return self.accepted if other is None or other in self.accepted else (*self.accepted, other)


def _only(accepted: Any, why: str) -> Refusal:
    return Refusal((accepted,), why)


_OWN_SOFTMAX = "the three branches have a softmax each, in fp32, as the paper has it"
_OWN_ROPE = "the layer turns queries and keys itself, pairs of numbers half a head apart, by one position a token"
_GRAPHS = "its exchanges are counted and its packs read on the host, which a captured layer cannot do"
_NOT_RUN = "it has not been run with these layers"
_KITCHEN = "its layers and kernels are for dense attention"

REFUSED: dict[str, Refusal] = {
    "apply_query_key_layer_scaling": _only(False, _OWN_SOFTMAX),
    "apply_residual_connection_post_layernorm": _only(False, "Megatron-core's own layer ignores it"),
    "attention_dropout": _only(0.0, "its kernels have no dropout"),
    "attention_output_gate": _only(False, "the branches have gates of their own"),
    "batch_invariant_mode": _only(False, "its kernels choose tiles by the number of tokens"),
    "cpu_offloading": _only(False, "Transformer Engine offloads what its own modules save, not what the branches do"),
    "cuda_graph_impl": _only("none", _GRAPHS),
    "enable_cuda_graph": _only(False, _GRAPHS),
    "external_cuda_graph": _only(False, _GRAPHS),
    "experimental_attention_variant": _only(None, "the layer is a variant itself"),
    "flash_decode": _only(False, "it reads one dense key and value a layer, and the cache of NSA is another"),
    "fp4": _only(None, _NOT_RUN),
    "fp8": _only(None, _NOT_RUN),
    "fp8_dot_product_attention": _only(False, "its kernels have no fp8"),
    "fp8_multi_head_attention": _only(False, "its kernels have no fp8"),
    "fused_residual_rmsnorm": _only(False, _NOT_RUN),
    "fused_single_qkv_rope": _only(False, _OWN_ROPE),
    "gtp_weight_remat_size": _only(1, "phi's weights are whole on every rank"),
    "expert_gtp_weight_remat_size": _only(1, _NOT_RUN),
    "heterogeneous_block_specs": _only(False, "all layers of a spec are alike"),
    "hybrid_context_parallel": _only(False, "tokens are cut over one context-parallel group, the same for all batches"),
    "init_model_with_meta_device": _only(False, "phi and the norms are drawn when they are made"),
    "log_max_attention_logit": _only(False, "no branch keeps its largest logit"),
    "mrope_section": _only(None, _OWN_ROPE),
    "multi_latent_attention": _only(False, "keys and values are projected of the hidden states"),
    "normalization": Refusal(("RMSNorm", "LayerNorm"), "the spec builds these two"),
    "overlap_moe_expert_parallel_comm": _only(False, _NOT_RUN),
    "qk_clip": _only(False, "no branch keeps its largest logit"),
    "rotary_interleaved": _only(False, _OWN_ROPE),
    "softmax_type": _only("vanilla", _OWN_SOFTMAX),
    "tensor_parallel_num_weight_shards": Refusal(
        (None, 1), "phi's weights are cut over tensor-parallel ranks alone", ("tensor_model_parallel_size",)
    ),
    "expert_tensor_parallel_num_weight_shards": Refusal(
        (None, 1), _NOT_RUN, ("expert_tensor_parallel_size", "tensor_model_parallel_size")
    ),
    "tp_comm_overlap": _only(False, _NOT_RUN),
    "transformer_impl": Refusal(
        ("transformer_engine", "local"), "the layer is built of the linear layers that train, and generates with them"
    ),
    "use_grouped_gemm_for_dense_mlp": _only(False, _NOT_RUN),
    "use_inference_optimized_layers": _only(
        False, "the layer is built of the linear layers that train, and generates with them"
    ),
    "use_kitchen": _only(False, _KITCHEN),
    "use_kitchen_attention": _only(False, _KITCHEN),
    "use_mup": _only(False, "phi's weights and the softmax scales of the branches do not follow its widths"),
    "use_te_activation_func": _only(False, _NOT_RUN),
    "use_transformer_engine_op_fuser": _only(False, _NOT_RUN),
    "window_attn_skip_freq": _only(None, "every layer has the window of its NSAConfig"),
    "window_size": _only(None, "the window is nsa.window_len"),
    # Arguments of Megatron-LM that core_transformer_config_from_args copies to fields of NSATransformerConfig.
    "reset_attention_mask": _only(
        False,
        "documents are told apart by packed_seq_params (--dataloader-inter-document-masking, --sft), not by a mask",
    ),
    "reset_position_ids": _only(
        False,
        "positions are counted in the documents of packed_seq_params (--dataloader-inter-document-masking, --sft)",
    ),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HONOURED: dict[str, frozenset[str]] = {
    "by the attention": _names(
        """add_bias_linear add_qkv_bias context_parallel_size deterministic_mode hidden_size init_method kv_channels
        num_attention_heads num_query_groups output_layer_init_method params_dtype perform_initialization
        recompute_granularity recompute_modules sequence_parallel softmax_scale tensor_model_parallel_size
        use_cpu_initialization delay_wgrad_compute no_rope_freq qk_layernorm qk_l2_norm"""
    ),
    "by the norms": _names("layernorm_epsilon layernorm_zero_centered_gamma"),
    "by the spec, which builds Megatron's MoE layer": _names("num_moe_experts moe_layer_freq moe_grouped_gemm"),
    "fine_grained_offloading, by Megatron for what is not attention": _names(
        "fine_grained_activation_offloading offload_modules"
    ),
    "by Megatron's layer and MLP around the attention": _names(
        """activation_func activation_func_clamp_value activation_func_fp8_input_store bias_activation_fusion
        bias_dropout_fusion ffn_hidden_size fp32_residual_connection gated_linear_unit glu_linear_offset hidden_dropout
        init_method_std mlp_chunks_for_training num_layers recompute_method recompute_num_layers
        use_fused_weighted_squared_relu distribute_saved_activations gradient_accumulation_fusion"""
    ),
}

IRRELEVANT: dict[str, frozenset[str]] = {
    "how dense attention is computed": _names(
        """apply_rope_fusion attention_backend attention_softmax_in_fp32 cp_comm_type flash_attention_version
        hierarchical_context_parallel_sizes kitchen_attention_backend masked_softmax_fusion"""
    ),
    "details of what is refused": _names(
        """_cpu_offloading_context cpu_offloading_activations cpu_offloading_double_buffering cpu_offloading_num_layers
        cpu_offloading_retain_pinned_cpu_buffers cpu_offloading_weights cuda_graph_modules
        cuda_graph_retain_backward_graph cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_warmup_steps
        delay_offload_until_cuda_graph disable_parameter_transpose_cache dsa_indexer_head_dim dsa_indexer_k_norm_epsilon
        dsa_indexer_k_norm_fp32 dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk
        dsa_indexer_topk_freq dsa_indexer_use_sparse_loss dsa_kernel_backend ep_overlap_early_attn_memory_release
        experimental_attention_variant_loss_scale_func first_last_layers_bf16 fp4_param fp4_quantizer_factory fp4_recipe
        fp8_amax_compute_algo fp8_amax_history_len fp8_interval fp8_margin fp8_output_proj fp8_param
        fp8_quantizer_factory fp8_recipe fp8_wgrad linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
        linear_num_key_heads linear_num_value_heads linear_value_head_dim max_seqlen_per_dp_cp_rank mup_attn_scale_power
        mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
        num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 overlap_dispatch_backward_with_experts_wgrad qk_clip_alpha
        qk_clip_threshold quant_recipe tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend tp_comm_bulk_dgrad
        tp_comm_bulk_wgrad tp_comm_overlap_ag tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_only_amax_red"""
    ),
    "details of the offloading of other modules": _names(
        """activation_offload_fraction delta_offload_bytes_across_pp_ranks fine_grained_offloading_max_inflight_offloads
        min_offloaded_tensor_size"""
    ),
    "which kernel a norm takes, for the same result": _names("memory_efficient_layer_norm persist_layer_norm"),
    "the inside of Megatron's MoE layer": _names(
        """expert_model_parallel_size expert_tensor_parallel_size high_priority_a2a_comm_stream
        moe_apply_probs_on_input moe_aux_loss_coeff moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay
        moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_extended_tp moe_ffn_hidden_size
        moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_grad_scale_func moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing
        moe_hybridep_pad_uneven_dispatch_inputs moe_input_jitter_eps moe_latent_size moe_layer_recompute
        moe_mlp_glu_interleave_size moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_expert_input_to_capacity
        moe_pad_experts_for_cuda_graph_inference moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_per_layer_logging moe_permute_fusion
        moe_permute_fusion_into_hybridep moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias
        moe_router_force_biased moe_router_force_load_balancing moe_router_fusion moe_router_group_topk
        moe_router_load_balancing_type moe_router_num_groups moe_router_padding_for_fp8
        moe_router_padding_for_quantization moe_router_pre_softmax moe_router_quantile_balancing_ema
        moe_router_score_function moe_router_topk moe_router_topk_limited_devices moe_router_topk_scaling_factor
        moe_shared_expert_gate moe_shared_expert_glu_interleave_size moe_shared_expert_intermediate_size
        moe_shared_expert_overlap moe_single_grouped_bias moe_single_grouped_weight moe_token_dispatcher_type
        moe_token_drop_policy moe_token_dropping moe_use_legacy_grouped_gemm moe_z_loss_coeff
        use_grouped_gemm_for_shared_expert"""
    ),
    "inference around the layer; what it does not take of a dynamic context it refuses when called": _names(
        """inference_cuda_graph_scope inference_disable_triton_nvls_kernels inference_fuse_tp_communication
        inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        inference_rng_tracker inference_sampling_seed mlp_chunks_for_prefill nccl_all_reduce_for_prefill
        symmetric_ar_type"""
    ),
    "other layers than transformer layers": _names(
        """is_hybrid_model mamba_head_dim mamba_num_groups mamba_num_heads mamba_state_dim
        mamba_training_ssm_states_dtype mtp_hybrid_override_pattern use_mamba_mem_eff_path"""
    ),
    "the model around its layers": _names(
        """calculate_per_token_loss clone_scatter_output_in_embedding cross_entropy_fusion_impl
        cross_entropy_loss_fusion defer_embedding_wgrad_compute embedding_init_method embedding_init_method_std
        mtp_detach_heads mtp_grad_scale_func mtp_loss_scaling_factor mtp_num_layers mtp_standalone
        mtp_use_repeated_layer wgrad_deferral_limit"""
    ),
    "pipelines, data parallelism, precision and random numbers of the whole run": _names(
        """account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        async_tensor_model_parallel_allreduce autocast_dtype barrier_with_L1_time batch_p2p_comm batch_p2p_sync bf16
        config_logger_dir deallocate_pipeline_outputs disable_bf16_reduced_precision_matmul enable_autocast
        finalize_model_grads_func fp16 grad_scale_func grad_sync_func hetereogenous_dist_checkpoint
        microbatch_group_size_per_vp_stage no_sync_func num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage num_microbatches_with_partial_activation_checkpoints overlap_p2p_comm
        overlap_p2p_comm_warmup_flush param_sync_func pipeline_dtype pipeline_model_parallel_comm_backend
        pipeline_model_parallel_layout pipeline_model_parallel_size test_mode timers use_ring_exchange_p2p
        use_te_rng_tracker variable_seq_lengths virtual_pipeline_model_parallel_size"""
    ),
}


def decided() -> set[str]:
    """The names of all fields that this table says something about."""
    return set(REFUSED).union(*HONOURED.values(), *IRRELEVANT.values())


def refuse_settings(config: Any) -> None:
    """ValueError for the first setting of `config` that the layer would not do."""
    for name, refusal in REFUSED.items():
        given, accepted = getattr(config, name, refusal.accepted[0]), refusal.accepted_in(config)
        if given not in accepted:
            values = " or ".join(f"{name}={value!r}" for value in accepted)
            raise ValueError(
                f"{name}={given!r} is not part of Native Sparse Attention as this layer computes it: {refusal.why}; "
                f"set {values}, or use Megatron's own attention in that layer"
            )
