"""How long process groups wait for a rank, and how many collectives each has begun.

A launcher sets the timeout of the default group; `nsa_dist.train.world.entered` gives the same to all of Megatron's.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from nsa_dist.cp.comm import timeout_of as timeout_of


def set_timeout(group: Any, timeout: timedelta) -> None:
    """Of every collective that begins from now on. Timeouts are kept in whole milliseconds."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def groups_of_this_rank() -> list[Any]:
    """The default group and those that Megatron has made with this rank in them."""
    made = getattr(parallel_state, "_global_process_group_list", None) or []
    return [dist.group.WORLD, *(group for group in made if group is not None)]


def collectives_begun() -> dict[str, int]:
    """By group, how many collectives this rank has begun; any thread may ask. A rank that hangs is behind the others.

    A group is named by its purpose and its ranks, `CONTEXT_PARALLEL_GROUP 0,1`, the same on all of them.
    """
    begun: dict[str, int] = {}
    if not dist.is_initialized():
        return begun
    for group in groups_of_this_rank():
        if (name := _name(group)) is not None:
            begun[name] = begun.get(name, 0) + group._get_sequence_number_for_group()
    return begun


def _name(group: Any) -> str | None:
    """None for a group that was closed meanwhile, or has this rank alone."""
    try:
        ranks = dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return None
    return f"{group.group_desc} {','.join(map(str, ranks))}" if len(ranks) > 1 else None
