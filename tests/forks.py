"""Processes that have torch and Megatron-core imported when they begin: forks of one server of a test process.

A process that imports them itself takes 7 s of a core for it.
"""

import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext

PRELOADED = ["nsa_dist.train.loop", "torch.utils.tensorboard", "torch.multiprocessing.spawn"]


def forks() -> ForkServerContext:
    """The context whose processes are such forks. They have this process's environment by `as_here` alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def as_here(environment: Mapping[str, str]) -> None:
    """Called in a fork, whose environment is that of the server's start, with the one of the process that asked."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
