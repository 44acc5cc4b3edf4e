"""Every argument of Megatron-LM that speaks of attention, positions, norms or the layout of data.

Most are fields of the configuration: `nsa_dist.mcore.settings` has them. Those that are not:

    REFUSED     ValueError for any value but those named here
    HONOURED    done, and by whom
    IRRELEVANT  of no effect on NSA layers, and why

Of core 0.16.1 and 0.19.0; `tests/mcore/megatron_lm/test_refusals.py` fails for an argument of a Megatron-LM given to it
that nobody decided about.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ArgumentRefusal:
    """The values that are accepted, why no other, and what to write instead: parts of one message."""

    accepted: tuple[Any, ...]
    why: str
    instead: str


def _off(why: str, instead: str = "leave it out") -> ArgumentRefusal:
    return ArgumentRefusal((None, False), why, instead)


_ROPE = "the layers turn queries and keys by rotary positions themselves, and by nothing else"
_OTHER_CONFIG = "Megatron-LM would take another class of configuration, without the sizes of the branches"
_PATTERN = "the layers of a hybrid model are said by one pattern, from core 0.19 on"
_WRITE_PATTERN = "write --hybrid-layer-pattern, or --num-layers for a GPT"
_UNTRIED = "it has not been run with these layers"

REFUSED: dict[str, ArgumentRefusal] = {
    "position_embedding_type": ArgumentRefusal(
        ("rope", "yarn"),
        _ROPE,
        "write --position-embedding-type rope or yarn, or leave it out ('none' would mean no positions, which "
        "--no-rope-freq 1 says of every layer)",
    ),
    "rope_type": ArgumentRefusal((None, "rope"), _ROPE, "write --rope-type rope, or leave it out"),
    "attention_backend": ArgumentRefusal(
        ("auto",), "it chooses among kernels of dense attention, and NSA has its own", "leave it out"
    ),
    "use_flash_attn": _off("it chooses a kernel of dense attention, and NSA has its own"),
    "multi_latent_attention": _off(_OTHER_CONFIG),
    "heterogeneous_layers_config_path": _off(_OTHER_CONFIG),
    "heterogeneous_layers_config_encoded_json": _off(_OTHER_CONFIG),
    "yaml_cfg": _off("the file takes the place of every argument, --nsa-... too", "write arguments"),
    "use_legacy_models": _off("it builds models that are not Megatron-core's"),
    "te_precision_config_file": _off(_UNTRIED),
    "use_megatron_fsdp": _off(_UNTRIED, "write --use-distributed-optimizer"),
    "use_torch_fsdp2": _off(_UNTRIED, "write --use-distributed-optimizer"),
    "hybrid_override_pattern": _off(_PATTERN, _WRITE_PATTERN),
    "hybrid_attention_ratio": ArgumentRefusal((None, 0.0), _PATTERN, _WRITE_PATTERN),
    "hybrid_mlp_ratio": ArgumentRefusal((None, 0.0), _PATTERN, _WRITE_PATTERN),
    "rl_use_sequence_packing": _off("it belongs to reinforcement learning, whose inference NSA layers refuse"),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HONOURED: dict[str, frozenset[str]] = {
    "by the layers' configuration": _names(
        """group_query_attention rotary_base rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling
        rope_scaling_factor"""
    ),
    "by the layers' configuration, under --position-embedding-type yarn": _names(
        """rotary_scaling_factor yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
        yarn_original_max_position_embeddings"""
    ),
    "by Megatron-LM's optimizers; Muon only with --muon-no-split-qkv": _names(
        """apply_wd_to_qk_layernorm optimizer muon_split_qkv muon_scalar_optimizer use_distributed_optimizer
        use_precision_aware_optimizer"""
    ),
    "by the layers: positions are rotary": _names("use_rotary_position_embeddings add_position_embedding"),
    "by the layers: documents of a pack are kept apart": _names("dataloader_inter_document_masking sft"),
    "by Megatron-LM's data, which the layers take as it comes": _names(
        """seq_length max_position_embeddings eod_mask_loss fim_data fim_eod_token fim_fragment_rate fim_middle_token
        fim_no_prefix fim_pad_token fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token
        sft_tokenizer_prompt_format"""
    ),
    "by the layers, which look whether the mask is causal": _names("create_attention_mask_in_dataloader"),
    "by the stack of NSA layers": _names("hybrid_layer_pattern"),
    "by this script: a module of nsa_dist.mcore is what it builds anyway": _names("spec"),
}

IRRELEVANT: dict[str, frozenset[str]] = {
    "details of what is refused": _names(
        """cache_mla_latents kv_lora_rank mla_down_proj_fusion qk_head_dim qk_pos_emb_head_dim v_head_dim
        fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer
        fsdp_manual_registration megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_grad_comm_dtype
        megatron_fsdp_main_grads_dtype megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer
        strict_fsdp_dtensor_load torch_fsdp2_reshard_after_forward"""
    ),
    "which kernel a norm takes, for the same result": _names("no_persist_layer_norm"),
    "other models' (T5, BERT)": _names(
        """decoder_seq_length encoder_seq_length mask_factor mask_prob mask_type relative_attention_max_distance
        relative_attention_num_buckets"""
    ),
    "inference and reinforcement learning, which are not this script's": _names(
        """inference_batch_times_seqlen_threshold inference_max_seq_length rl_kv_cache_management_mode
        rl_offload_kv_cache_during_training rl_remove_kv_cache_during_training rl_sequence_packing_algo
        rl_sequence_packing_max_sequences_per_bin"""
    ),
    "restarts": _names("enable_ft_package"),
}


def decided() -> set[str]:
    """The names of all arguments that these tables say something about."""
    return set(REFUSED).union(*HONOURED.values(), *IRRELEVANT.values())


def refuse_arguments(args: Namespace) -> None:
    """ValueError for the first of Megatron-LM's arguments that these layers, or this script, would not do."""
    for name, refusal in REFUSED.items():
        given = getattr(args, name, refusal.accepted[0])
        given = getattr(given, "name", given)  # of an enumeration
        if given not in refusal.accepted:
            raise ValueError(
                f"--{name.replace('_', '-')} is {given!r}, but Native Sparse Attention needs {refusal.accepted[0]!r}: "
                f"{refusal.why}; {refusal.instead}"
            )
    _refuse_other_spec(getattr(args, "spec", None))
    _refuse_split_of_projection(getattr(args, "optimizer", "adam"), getattr(args, "muon_split_qkv", False))
    _refuse_scrambled_labels(args)


def _refuse_other_spec(spec: Any) -> None:
    if spec is not None and not spec[0].startswith("nsa_dist.mcore"):
        raise ValueError(
            f"--spec is {' '.join(spec)!r}, but needs to be nsa_dist's: this script builds NSA layers, and would build "
            f"others there; leave --spec out, or use pretrain_gpt.py"
        )


def _refuse_scrambled_labels(args: Namespace) -> None:
    """Megatron-core's shift of tokens and labels takes each document of a pack for a zigzag of its own."""
    size, packs = getattr(args, "context_parallel_size", 1), getattr(args, "dataloader_inter_document_masking", False)
    if getattr(args, "mtp_num_layers", None) and size > 1 and packs and not getattr(args, "sft", False):
        raise ValueError(
            f"--mtp-num-layers with --dataloader-inter-document-masking and --context-parallel-size {size}: the row of "
            f"a pack is cut as one zigzag, but Megatron-core shifts labels as if each document were one, so tokens at "
            f"the cuts would learn from wrong ones; leave one of the three out, or train with nsa-dist train"
        )


def _refuse_split_of_projection(optimizer: str, split: bool) -> None:
    if "muon" in optimizer and split:
        raise ValueError(
            f"--optimizer {optimizer} splits linear_qkv into q, k and v, but NSA's rows there are q, three pairs of K "
            f"and V, and gates: they would be cut at the wrong places; write --muon-no-split-qkv"
        )
