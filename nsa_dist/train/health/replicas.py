"""Whether all replicas of the weights are the same, to the bit.

Data-parallel and context-parallel ranks hold copies of the same weights and move them by the same gradients. Should a
copy drift (a bit that flipped, a fault of a device or of a library), losses go on falling and nothing says so.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.train.model import Trainable
from nsa_dist.train.world import World

_AT_ONCE = 2**22  # numbers of a weight that are hashed together
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, so that a number counts whole; 2**64 / golden ratio
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 4  # weights in a message


def mismatch(model: Trainable, world: World) -> str:
    """Which ranks hold which weight otherwise than their replicas, on every process; "" if none does."""
    group = Comm(parallel_state.get_data_parallel_group(with_context_parallel=True))
    if group.size == 1:
        found: list[Any] = []
    else:
        names, hashes = zip(*hashes_of(model).items(), strict=True)
        table = group.all_gather(torch.stack(hashes), "replicas").tolist()  # [replicas, weights]
        ranks = dist.get_process_group_ranks(group.group)
        found = differing(list(names), ranks, table) if group.rank == 0 else []
    gathered = [each for part in world.gathered(found) for each in part]
    lines = [f"{name} on {_ranks(ranks)}" for name, ranks in gathered[:_SHOWN]]
    more = f", and {len(gathered) - _SHOWN} more" if len(gathered) > _SHOWN else ""
    return ", ".join(lines) + more


def hashes_of(model: Trainable) -> dict[str, Tensor]:
    """An int64 of every weight of this rank, by name; it depends on every bit and on its place."""
    return {name: hash_of(weight.detach()) for name, weight in model.bare_model.named_parameters()}


@torch.no_grad()
def hash_of(weight: Tensor) -> Tensor:
    """int64 []: the sum of (number + 1) * (place + 1) * factor, mod 2**64; the same in every order of summing.

    A number is taken as the integer that its bits spell.
    """
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    spelled = weight.contiguous().view(_INTEGERS[weight.element_size()]).flatten()
    for first in range(0, len(spelled), _AT_ONCE):
        part = spelled[first : first + _AT_ONCE].long()
        places = torch.arange(first + 1, first + 1 + len(part), device=weight.device)
        total += ((part + 1) * (places * _FACTOR | 1)).sum()
    return total


def differing(
    names: Sequence[str], ranks: Sequence[int], table: Sequence[Sequence[int]]
) -> list[tuple[str, list[int]]]:
    """(weight, ranks that hold it otherwise than most; all where no side is larger) from a row of hashes a replica."""
    found = []
    for name, column in zip(names, zip(*table, strict=True), strict=True):
        (value, times), *others = Counter(column).most_common()
        if others:
            is_clear = times > others[0][1]
            found.append((name, [r for r, seen in zip(ranks, column, strict=True) if not is_clear or seen != value]))
    return found


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
