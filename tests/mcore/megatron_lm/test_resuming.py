"""A checkpoint is resumed with the sizes that it was trained with."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_lm_cases import parsed
from nsa_dist.mcore.megatron_lm.resuming import comparing_sizes, refuse_other_sizes


def test_other_sizes_are_refused():
    saved = parsed()
    refuse_other_sizes(parsed(), saved)
    refuse_other_sizes(parsed(), Namespace())  # a dense model's: its weights do not fit, and Megatron-LM says so
    for words in ("--nsa-window-len 128", "--nsa-shared-kv", "--nsa-num-local-blocks 1"):
        flag = words.split()[0]
        with pytest.raises(ValueError, match=f"{flag} is .*, but the checkpoint's is .*: .*; give the checkpoint's"):
            refuse_other_sizes(parsed(*words.split()), saved)


def test_how_blocks_travel_may_change():
    refuse_other_sizes(parsed("--nsa-keep-pages", "--nsa-head-groups", "1"), parsed())


def test_megatron_lm_compares_its_own_first_and_is_as_it_was_afterwards():
    seen = []

    def stock(checkpoint_args, skip_args=None):
        seen.append(skip_args)

    checkpointing = SimpleNamespace(check_checkpoint_args=stock, get_args=parsed)
    with comparing_sizes(checkpointing):
        checkpointing.check_checkpoint_args(parsed(), skip_args={"num_layers"})
        with pytest.raises(ValueError, match="--nsa-window-len"):
            checkpointing.check_checkpoint_args(parsed("--nsa-window-len", "32"))
    assert seen == [{"num_layers"}, None]
    assert checkpointing.check_checkpoint_args is stock
