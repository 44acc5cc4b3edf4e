"""Megatron-LM's `pretrain_gpt.py` with NSA layers: its data, its loss, its training loop, all of its arguments.

With `--hybrid-layer-pattern` (core 0.19) it is `pretrain_hybrid.py`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

from megatron.core.enums import ModelType

from nsa_dist.mcore.megatron_lm.arguments import add_nsa_arguments
from nsa_dist.mcore.megatron_lm.counts import counting_nsa
from nsa_dist.mcore.megatron_lm.models import build_gpt, gpt_model_config, hybrid_model_config
from nsa_dist.mcore.megatron_lm.resuming import comparing_sizes


def pretrain() -> None:
    """Train by the arguments of the command line; `torchrun` starts one process a GPU.

    ValueError for arguments that NSA layers would not do. SystemExit with a message where Megatron-LM's checkout is not
    on the path.
    """
    try:
        import pretrain_gpt as stock
        from megatron.training import checkpointing, inprocess_restart, training
    except ModuleNotFoundError as error:
        if error.name not in ("pretrain_gpt", "megatron.training"):
            raise
        sys.exit(f"{error}: Megatron-LM's own training loop is what runs here; put its checkout first on PYTHONPATH")
    stock.train_valid_test_datasets_provider.is_distributed = True
    loop_reads_arguments = "extra_args_provider" in inspect.signature(training.pretrain).parameters  # of 0.16
    run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(training.pretrain)
    with counting_nsa(training), comparing_sizes(checkpointing):
        if loop_reads_arguments:
            run(
                stock.train_valid_test_datasets_provider,
                partial(stock.model_provider, build_gpt),
                ModelType.encoder_or_decoder,
                stock.forward_step,
                extra_args_provider=add_nsa_arguments,
                get_embedding_ranks=stock.get_embedding_ranks,
                store=store,
            )
        else:
            _pretrain_by_container(partial(run, store=store), stock)


def _pretrain_by_container(run: Callable[..., None], gpt: ModuleType) -> None:
    """Core 0.19 and later: the command line makes one configuration of the whole run."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_nsa_arguments)
    if args.hybrid_layer_pattern is None:
        stock, model, ranks = gpt, gpt_model_config(args), {"get_embedding_ranks": gpt.get_embedding_ranks}
    else:
        stock, model, ranks = importlib.import_module("pretrain_hybrid"), hybrid_model_config(args), {}
    stock.train_valid_test_datasets_provider.is_distributed = True
    run(
        pretrain_cfg_container_from_args(args, model),
        stock.train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        stock.forward_step,
        **ranks,
    )
