"""The arguments of NSA on Megatron-LM's command line, and the layers' configuration of all its arguments."""

import copy
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any

from nsa_dist.config import NSAConfig
from nsa_dist.cp.options import TRANSPORTS, FetchOptions
from nsa_dist.mcore.config import NSATransformerConfig
from nsa_dist.mcore.megatron_lm.refusals import refuse_arguments

# What Megatron-LM says where nobody says anything is for dense attention; here it is what NSA layers do.
_DEFAULTS = {
    "position_embedding_type": "rope",  # the layers' own, by --rotary-base
    "attention_dropout": 0.0,
    "create_attention_mask_in_dataloader": False,  # tokens x tokens for each sample, and read by nobody
    "apply_rope_fusion": False,  # of dense attention, and an error without Transformer Engine
}


def add_nsa_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Megatron-LM's `extra_args_provider`: `--nsa-...` for the fields of NSAConfig, FetchOptions and the layer.

    Four arguments of Megatron-LM get the values of NSA layers as their defaults: `--position-embedding-type rope`,
    `--attention-dropout 0`, `--no-rope-fusion`, `--no-create-attention-mask-in-dataloader`.
    """
    group = parser.add_argument_group("Native Sparse Attention (arXiv 2502.11089)")
    for name, default in _numbers().items():
        kind = float if isinstance(default, float) or name == "link_gb_per_s" else int
        group.add_argument(_flag(name), type=kind, default=default, help=f"nsa_dist: {name} (%(default)s)")
    group.add_argument(
        "--nsa-transport", choices=TRANSPORTS, default="auto", help="how context-parallel ranks exchange"
    )
    group.add_argument("--nsa-keep-pages", action="store_true", help="keep fetched blocks for backward")
    group.add_argument("--nsa-shared-kv", action="store_true", help="one K/V for the three branches, not one each")
    group.add_argument("--nsa-compression", choices=["mlp", "mean"], default="mlp", help="how a block becomes one key")
    group.add_argument(
        "--no-nsa-compress-before-rope",
        action="store_false",
        dest="nsa_compress_before_rope",
        help="compress keys that are turned already",
    )
    group.add_argument("--nsa-gate-bias", action="store_true", help="a bias of the gates, one number a head and branch")
    group.add_argument("--nsa-v-head-dim", type=int, default=None, help="head dim of values, if not --kv-channels")
    parser.set_defaults(**_DEFAULTS)
    return parser


def nsa_config_from_args(args: Namespace) -> NSATransformerConfig:
    """The configuration that Megatron-LM's parsed arguments make, by its own translation.

    ValueError for an argument that the layers would not do (`refusals.py`, `nsa_dist.mcore.settings`). `args` stay as
    they are: Megatron-LM saves them with the weights, and its loader takes numbers and texts only.
    """
    from megatron.training.arguments import core_transformer_config_from_args

    refuse_arguments(args)
    config = core_transformer_config_from_args(with_fields(args), NSATransformerConfig)
    if getattr(args, "distributed_backend", "nccl") == "gloo":  # it still sends what Megatron would free: wrong losses
        config.deallocate_pipeline_outputs = False
    return config


def with_fields(args: Namespace) -> Namespace:
    """A copy with the fields of NSATransformerConfig that no single argument is."""
    args = copy.copy(args)
    args.nsa = sizes_from_args(args)
    args.nsa_fetch = fetch_from_args(args)
    args.nsa_rotary_base = float(args.rotary_base)
    vars(args).update(_yarn_from_args(args))
    return args


# Fields of YaRN, and what Megatron-LM calls them.
_YARN = {
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "yarn_beta_fast": "yarn_beta_fast",
    "yarn_beta_slow": "yarn_beta_slow",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    "yarn_correction_range_round_to_int": "yarn_correction_range_round_to_int",
}


def _yarn_from_args(args: Namespace) -> dict[str, Any]:
    """Its numbers under `--position-embedding-type yarn`; an argument that nobody gave is None, and has its default."""
    values = {field.name: field.default for field in fields(NSATransformerConfig) if field.name in _YARN}
    if args.position_embedding_type == "yarn":
        given = {name: getattr(args, argument, None) for name, argument in _YARN.items()}
        values.update({name: value for name, value in given.items() if value is not None})
    return values


def fetch_from_args(args: Namespace) -> FetchOptions:
    return FetchOptions(**{field.name: getattr(args, f"nsa_{field.name}") for field in fields(FetchOptions)})


def sizes_from_args(args: Namespace) -> NSAConfig:
    return NSAConfig(**{field.name: getattr(args, f"nsa_{field.name}") for field in fields(NSAConfig)})


def _numbers() -> dict[str, Any]:
    """Fields that are numbers, with their defaults."""
    both = (*fields(NSAConfig), *fields(FetchOptions))
    return {field.name: field.default for field in both if not isinstance(field.default, bool | str)}


def _flag(name: str) -> str:
    return "--nsa-" + name.replace("_", "-")
