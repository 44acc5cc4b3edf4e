"""Where the ranks came to lie, and whether the groups that talk in every layer share a fast link."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist

from nsa_dist.cp.comm import Comm
from nsa_dist.train.refused import Refused

_RECORD_BYTES = 1024  # of one rank's JSON, padded with spaces


@dataclass(frozen=True)
class RankPlace:
    """One rank's process and its place, as `topology.json` lists them in the order of ranks."""

    rank: int
    host: str
    pid: int
    node: str
    nvlink_domain: str
    device: str


def violations(places: Sequence[RankPlace], group_size: int) -> list[str]:
    """Blocks of `group_size` consecutive ranks that lie in more than one NVLink domain.

    Megatron numbers ranks tp-cp-ep-dp-pp, fastest first, so consecutive ranks are the tensor x context parallel groups.
    """
    found = []
    for first in range(0, len(places), group_size):
        domains = sorted({place.nvlink_domain for place in places[first : first + group_size]})
        if len(domains) > 1:
            found.append(f"ranks {first}..{first + group_size - 1} lie in {len(domains)} domains: {', '.join(domains)}")
    return found


def check(places: Sequence[RankPlace], group_size: int) -> None:
    """ValueError that names the ranks when a tensor x context parallel group leaves its NVLink domain."""
    found = violations(places, group_size)
    if found:
        raise Refused(
            f"tensor * context parallel groups of {group_size} ranks must share an NVLink domain, because they talk in "
            f"every layer; {'; '.join(found)}. Ask for whole nodes (launch.processes_per_node, launch.label_selector), "
            f"or accept the network with launch.allow_split_groups=true"
        )


def exchange(mine: RankPlace, device: torch.device) -> list[RankPlace]:
    """Every rank's place, in the order of ranks, on every rank. Collective over all ranks."""
    record = json.dumps(asdict(mine)).encode()
    if len(record) > _RECORD_BYTES:
        raise ValueError(f"the place of rank {mine.rank} takes {len(record)} bytes of JSON, more than {_RECORD_BYTES}")
    row = torch.tensor(list(record.ljust(_RECORD_BYTES)), dtype=torch.uint8, device=device)
    rows = Comm(dist.group.WORLD).all_gather(row, "layout").cpu()
    return [_parse(bytes(row.tolist())) for row in rows]


def _parse(record: bytes) -> RankPlace:
    raw = json.loads(record)
    return RankPlace(**{field.name: raw[field.name] for field in fields(RankPlace)})
