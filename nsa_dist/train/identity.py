"""What makes a run the run it is. Going on with other values of these keys would be another run under its name.

Every key of a configuration is decided about here: it may not change, with the reason, or it may. A test walks them.
"""

from collections.abc import Mapping
from typing import Any

from nsa_dist.train.config import RunSection, TrainConfig

_SIZES = "the checkpoint's weights have these sizes"
_DRAWN = "the weights were drawn with it"
_ATTENTION = "the model was trained to attend so"
_ROUTING = "the model was trained to take so much of its experts"
_TASKS = "samples of tasks are drawn by it, in between those of text"
_DOCUMENTS = "the model was trained to see so far, and no further"
_CORPUS = "the corpus of the run was packed with it"

FIXED: dict[str, str] = {
    "run.sequence_length": "the corpus is cut into samples of this length",
    "run.seed": "it drew the weights and orders the samples",
    "run.dtype": "the checkpoint's weights and optimizer states are of it",
    "model.attention": _ATTENTION,
    "model.num_layers": _SIZES,
    "model.hidden_size": _SIZES,
    "model.num_attention_heads": _SIZES,
    "model.num_query_groups": _SIZES,
    "model.head_dim": _SIZES,
    "model.ffn_hidden_size": _SIZES,
    "model.num_experts": _SIZES,
    "model.moe_layer_freq": _SIZES,
    "model.moe_ffn_hidden_size": _SIZES,
    "model.moe_shared_expert_intermediate_size": _SIZES,
    "model.moe_router_topk": _ROUTING,
    "model.moe_router_pre_softmax": _ROUTING,
    "model.tie_embeddings": _SIZES,
    "model.qk_norm": _ATTENTION,
    "model.norm_eps": _ATTENTION,
    "model.init_std": _DRAWN,
    "model.embedding_init_std": _DRAWN,
    "nsa.cmp_block_len": _ATTENTION,
    "nsa.cmp_stride": _ATTENTION,
    "nsa.slc_block_len": _ATTENTION,
    "nsa.num_slc_blocks": _ATTENTION,
    "nsa.num_init_blocks": _ATTENTION,
    "nsa.num_local_blocks": _ATTENTION,
    "nsa.window_len": _ATTENTION,
    "nsa.shared_kv": _ATTENTION,
    "nsa.compression": _ATTENTION,
    "nsa.compress_before_rope": _ATTENTION,
    "nsa.rotary_base": _ATTENTION,
    "nsa.rotary_percent": _ATTENTION,
    "nsa.rope_scaling": _ATTENTION,
    "nsa.no_rope_freq": _ATTENTION,
    "nsa.gate_bias": _SIZES,
    "data.folder": _CORPUS,
    "data.pattern": _CORPUS,
    "data.validation_fraction": _CORPUS,
    "data.max_file_bytes": _CORPUS,
    "data.tokens": "the run was begun on these tokens",
    "data.documents": _DOCUMENTS,
    "data.tasks": _TASKS,
    "data.task_lengths": _TASKS,
}
# These may, if the same texts or tokens come of them: `prepare`.
OF_TEXTS = {"data.folder", "data.pattern", "data.validation_fraction", "data.max_file_bytes", "data.tokens"}

# These change nothing that a step computes from the same samples (to rounding), or are meant to be changed on the way.
FREE = {
    "run.start_from",  # a run that goes on has its own weights
    "run.steps", "run.micro_batch_size", "run.global_batch_size", "run.eval_interval", "run.eval_batches",
    "run.eval_far_context",
    "run.checkpoint_interval", "run.keep_checkpoints", "run.log_interval", "run.not_finite",
    "run.not_finite_limit", "run.health_interval", "run.replica_check_interval", "model.recompute_attention",
    "model.moe_aux_loss_coeff",
    "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size", "parallel.context_parallel_size",
    "parallel.expert_model_parallel_size", "parallel.sequence_parallel", "parallel.layout", "parallel.pack_order",
    "parallel.kv_fetch_budget_bytes",
    "parallel.whole_shard_fraction", "parallel.link_gb_per_s", "parallel.keep_pages", "parallel.head_groups",
    "parallel.transport", "parallel.domain_size",
    "optimizer.lr", "optimizer.min_lr", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.weight_decay",
    "optimizer.clip_grad", "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_eps",
}  # fmt: skip
FREE_SECTIONS = {"launch"}  # the launcher's: where and how the processes run
EARLIER = {"data.documents": "whole"}  # what a key stood for in runs from before there was one
INSTRUCTIONS = {"run.output_dir", "run.resume", "run.overwrite"}  # what to do with the folder, and where it is


def keys_of(config: TrainConfig) -> dict[str, Any]:
    """{"section.key": value} in JSON's types, the places of texts and tokens absolute."""
    data = config.data.moved(lambda _, path: path.expanduser().absolute())
    raw = config.model_copy(update={"data": data}).model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in raw.items() for key, value in keys.items()}


def identity(config: TrainConfig) -> dict[str, Any]:
    """The keys that may not change."""
    return {key: value for key, value in keys_of(config).items() if key in FIXED}


def settings(config: TrainConfig) -> dict[str, Any]:
    """The keys that may."""
    return {key: value for key, value in keys_of(config).items() if key not in FIXED.keys() | INSTRUCTIONS}


def differences(old: Mapping[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """{key: (old, new)} of the keys that may not change.

    A key that a run began without had its default, or what `EARLIER` says.
    """
    defaults = {**identity(TrainConfig(run=RunSection(output_dir=config.run.output_dir))), **EARLIER}
    pairs = {key: (old.get(key, defaults[key]), new) for key, new in identity(config).items()}
    return {key: (was, now) for key, (was, now) in pairs.items() if was != now}


def changes(old: Mapping[str, Any], config: TrainConfig) -> dict[str, list[Any]]:
    """{key: [old, new]} of the keys that may change and did."""
    new = settings(config)
    return {key: [old[key], new[key]] for key in new if key in old and old[key] != new[key]}
