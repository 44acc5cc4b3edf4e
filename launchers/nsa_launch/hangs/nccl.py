"""Collectives over NCCL that wait too long: a thread of torch's ends their process, and no exception reaches Python.

What torch reads of `nsa_launch.ranks.environment` decides how, and how long after the timeout.
"""

from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from nsa_dist.mcore.groups import groups_of_this_rank


def timed_out() -> bool:
    """Whether a collective of this rank has waited for longer than its group's timeout; any thread may ask.

    From then on the process has four times TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC to live. False without NCCL.
    """
    return dist.is_initialized() and any(_error(group) == "TIMEOUT" for group in groups_of_this_rank())


def _error(group: Any) -> str:
    """The name of torch's `ErrorType`; nothing for other backends, and for a group that is made or closed just now."""
    with suppress(RuntimeError, ValueError, KeyError, AttributeError):
        return str(group._get_backend(torch.device("cuda")).get_error().name)
    return ""
