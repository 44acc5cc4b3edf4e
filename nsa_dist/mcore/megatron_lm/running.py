"""Megatron-LM's `pretrain_gpt.py` with NSA layers: its data, its loss, its training loop, all of its arguments."""

import inspect
import sys
from functools import partial
from typing import Any

from megatron.core.enums import ModelType

from nsa_dist.mcore.megatron_lm.arguments import add_nsa_arguments
from nsa_dist.mcore.megatron_lm.counts import counting_nsa
from nsa_dist.mcore.megatron_lm.models import build_gpt, gpt_model_config
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
    reads_arguments = "extra_args_provider" in inspect.signature(training.pretrain).parameters  # of 0.16
    run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(training.pretrain)
    common = {"store": store, "get_embedding_ranks": stock.get_embedding_ranks}
    with counting_nsa(training), comparing_sizes(checkpointing):
        if reads_arguments:
            run(
                stock.train_valid_test_datasets_provider,
                partial(stock.model_provider, build_gpt),
                ModelType.encoder_or_decoder,
                stock.forward_step,
                extra_args_provider=add_nsa_arguments,
                **common,
            )
        else:
            run(
                _container(),
                stock.train_valid_test_datasets_provider,
                ModelType.encoder_or_decoder,
                stock.forward_step,
                **common,
            )


def _container() -> Any:
    """The configuration of the whole run (core 0.19 and later), of the command line."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_nsa_arguments)
    return pretrain_cfg_container_from_args(args, gpt_model_config(args))
