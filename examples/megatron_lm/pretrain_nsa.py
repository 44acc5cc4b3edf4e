"""Stock Megatron-LM trains a GPT whose layers are Native Sparse Attention. Nothing of Megatron-LM is changed.

    export PYTHONPATH=/path/to/Megatron-LM
    torchrun --nproc-per-node 8 examples/megatron_lm/pretrain_nsa.py \\
        --position-embedding-type none --context-parallel-size 8 --calculate-per-token-loss ... \\
        --nsa-num-slc-blocks 16 --nsa-window-len 512

Every argument of `pretrain_gpt.py` goes through as it is; README.md beside this file says which ones NSA layers need.
What a layer would not do, it refuses by itself: learned positions, attention dropout and so on.
"""

import copy
import inspect
import sys
from dataclasses import fields
from functools import partial

from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel

from nsa_dist import NSAConfig
from nsa_dist.mcore import NSATransformerConfig, nsa_block_spec, nsa_layer_spec


def add_nsa_arguments(parser):
    """The sizes of NSAConfig, and three fields of NSATransformerConfig under their own names."""
    group = parser.add_argument_group("Native Sparse Attention")
    for size in fields(NSAConfig):
        flag = "--nsa-" + size.name.replace("_", "-")
        group.add_argument(flag, type=int, default=size.default, help=f"{size.name} of NSAConfig (%(default)s)")
    group.add_argument("--nsa-shared-kv", action="store_true", help="one K/V for the three branches, not one each")
    group.add_argument("--nsa-compression", choices=["mlp", "mean"], default="mlp", help="how a block becomes one key")
    group.add_argument("--nsa-rotary-base", type=float, default=10_000.0, help="of queries and keys (%(default)s)")
    return parser


def nsa_sizes(args):
    return NSAConfig(**{size.name: getattr(args, "nsa_" + size.name) for size in fields(NSAConfig)})


def transformer_config(args):
    """Megatron-LM's own translation of its arguments, into our class: it copies every field by its name."""
    from megatron.training.arguments import core_transformer_config_from_args

    args = copy.copy(args)  # Megatron-LM saves its arguments with the weights: leave them as it made them
    args.nsa = nsa_sizes(args)
    return core_transformer_config_from_args(args, NSATransformerConfig)


def layers(config, vp_stage=None):
    """The layers of a pipeline stage. Without Transformer Engine also the final norm, fit for sequence parallelism."""
    if config.transformer_impl == "transformer_engine":
        return nsa_layer_spec(config, backend="transformer_engine")
    return nsa_block_spec(config, vp_stage=vp_stage)


def build_model(args, pre_process, post_process, vp_stage=None, config=None, pg_collection=None):
    """What `gpt_builder` of Megatron-LM does, with these layers. Its `model_provider` calls it."""
    config = config or transformer_config(args)
    return GPTModel(
        config,
        layers(config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,  # "none": the attention turns q and k itself
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def main():
    try:
        import pretrain_gpt as stock
        from megatron.training import pretrain
    except ModuleNotFoundError as error:
        if error.name not in ("pretrain_gpt", "megatron.training"):
            raise
        sys.exit(f"{error}: Megatron-LM's own training loop is what runs here; put its checkout first on PYTHONPATH")
    stock.train_valid_test_datasets_provider.is_distributed = True
    if "extra_args_provider" in inspect.signature(pretrain).parameters:  # up to 0.16 it reads the arguments itself
        pretrain(
            stock.train_valid_test_datasets_provider,
            partial(stock.model_provider, build_model),
            ModelType.encoder_or_decoder,
            stock.forward_step,
            extra_args_provider=add_nsa_arguments,
            get_embedding_ranks=stock.get_embedding_ranks,
        )
        return
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_nsa_arguments)
    model = gpt_config_from_args(args, config=transformer_config(args))
    model.transformer_layer_spec = lambda config, vp_stage: layers(config.transformer, vp_stage)
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        stock.train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        stock.forward_step,
        get_embedding_ranks=stock.get_embedding_ranks,
    )


if __name__ == "__main__":
    main()
