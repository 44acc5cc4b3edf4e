"""Megatron-LM compares a few arguments with those in the checkpoint that it resumes; here those of NSA as well.

Most sizes of the branches are in no weight's shape: with another window the weights would load, and be another model's.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from nsa_dist.cp.options import FetchOptions
from nsa_dist.mcore.cpu import replaced


@contextmanager
def comparing_sizes(checkpointing: Any) -> Iterator[None]:
    """Inside, `checkpointing` (the module megatron.training.checkpointing) resumes NSA of the same sizes only."""
    stock = checkpointing.check_checkpoint_args

    def check(checkpoint_args: Namespace, *others: Any, **named: Any) -> None:
        stock(checkpoint_args, *others, **named)
        refuse_other_sizes(checkpointing.get_args(), checkpoint_args)

    with replaced(checkpointing, "check_checkpoint_args", check):
        yield


def refuse_other_sizes(args: Namespace, saved: Namespace) -> None:
    """ValueError for an `--nsa-...` argument that is not what the checkpoint's was; how blocks travel may change."""
    free = {f"nsa_{field.name}" for field in fields(FetchOptions)}
    for name, value in vars(args).items():
        if name.startswith("nsa_") and name not in free and getattr(saved, name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is {value!r}, but the checkpoint's is {getattr(saved, name)!r}: the same weights would be "
                f"another model; give the checkpoint's, or --finetune to start a run of its own from these weights"
            )
