"""Which transport a group uses, found once: what its ranks say of themselves decides, the same on every rank."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.cp.comm import Comm, fingerprint, shared_memory
from nsa_dist.cp.options import FetchOptions

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Transport:
    """`name` is one of `TRANSPORTS` but auto, or `alone`; `why` says why it is not one-sided."""

    name: str
    why: str = ""

    def __str__(self) -> str:
        return self.name if not self.why else f"{self.name}, as {self.why}"


_FOUND: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Transport]] = WeakKeyDictionary()


def with_transport(comm: Comm, fetch: FetchOptions, q: Tensor) -> Comm:
    """`comm`, or one that reads other ranks' memory in its stead, in line where the call is short.

    A `Comm` of another class stays what it is. ValueError on every rank if one-sided transport is asked for where it
    cannot be, or domains that do not divide the group.
    """
    if comm.size == 1:
        return comm
    if fetch.domain_of(comm.size) > 1 and comm.reads_memory:
        raise ValueError(
            f"domain_size={fetch.domain_size} was given with ranks that read each other's memory, where every page is "
            f"read where it lies and none passed on; leave domain_size out"
        )
    if type(comm) is Comm and comm.group is not None:
        if transport_of(comm.group, fetch, q.device).name != "one_sided":
            return comm
        from nsa_dist.cp.one_sided.comm import OneSidedComm
        from nsa_dist.cp.one_sided.mailboxes import shared_mailboxes

        comm = OneSidedComm(comm.group, comm.traffic, comm.trace, shared_mailboxes(comm.group, q.device))
    return comm.for_call(q)


def transport_of(group: dist.ProcessGroup, fetch: FetchOptions, device: torch.device) -> Transport:
    """What `fetch.transport` means for a group. The first time, all its ranks call this, and their hosts wait."""
    if fetch.domain_size is not None and (size := fetch.domain_of(dist.get_world_size(group))) > 1:
        return Transport("all_to_all", f"a page is to enter each domain of {size} ranks once")
    if fetch.transport == "all_to_all" or device.type != "cuda":
        chosen = Transport("all_to_all", "it was asked for" if device.type == "cuda" else "ranks are on CPUs")
    else:
        of_devices = _FOUND.setdefault(group, {})
        if device not in of_devices:
            of_devices[device] = _find(group, device)
        chosen = of_devices[device]
    if fetch.transport == "one_sided" and chosen.name != "one_sided":
        raise ValueError(
            f"transport='one_sided' was given, but {chosen.why}: ranks could not read each other's memory; take "
            f"transport='auto' or 'all_to_all', or one GPU a rank on one host"
        )
    return chosen


def gather_facts(group: dist.ProcessGroup, facts: list[int], device: torch.device) -> list[list[int]]:
    """Small numbers of every rank, on every rank; the host waits."""
    mine = torch.tensor(facts, device=device if dist.get_backend(group) == "nccl" else "cpu")
    return Comm(group).all_gather(mine, "layout").tolist()


def what_is_missing(devices: Sequence[int]) -> str:
    """Why GPUs of this process could not read each other's memory; empty if they can."""
    if len(devices) < 2:
        return "there is one GPU" if devices else "there is no GPU"
    if not _has_symmetric_memory():
        return f"torch {torch.__version__} has no symmetric memory"
    if not all(_sees_peers(torch.device("cuda", index)) for index in devices):
        return "some of its GPUs cannot reach each other's memory"
    return ""


def _find(group: dist.ProcessGroup, device: torch.device) -> Transport:
    properties = torch.cuda.get_device_properties(device)
    facts = [
        fingerprint(_host()),
        fingerprint(str(properties.uuid)),
        int(_has_symmetric_memory()),
        int(_sees_peers(device)),
    ]
    found = decided(gather_facts(group, facts, device))
    if found.name == "one_sided":
        why = _refusal(group, device)
        if any(refused for (refused,) in gather_facts(group, [int(bool(why))], device)):
            return Transport("all_to_all", why or "another rank could not share memory")
    return found


def _refusal(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why torch does not let the group share memory; empty if it does. It refuses on all ranks or on none."""
    try:
        shared_memory(group, 1024, device)
    except RuntimeError as error:
        hint = ""
        if "overlapping devices" in str(error):  # each rank sees its own GPU alone
            hint = "; set TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1, as nsa-dist's launchers do"
        return f"torch shares no memory here ({str(error).splitlines()[0]}{hint})"
    return ""


def decided(facts: list[list[int]]) -> Transport:
    """facts      of every rank: host, GPU, whether torch has symmetric memory, whether its GPU reaches the others"""
    hosts, devices, able, sees = zip(*facts, strict=True)
    if not all(able):
        return Transport("all_to_all", "torch has no symmetric memory on some rank")
    if len(set(hosts)) > 1:
        return Transport("all_to_all", f"its ranks are on {len(set(hosts))} hosts")
    if len(set(devices)) < len(devices):
        return Transport("all_to_all", "some of its ranks share a GPU")
    if not all(sees):
        return Transport("all_to_all", "some of its GPUs cannot reach each other's memory")
    return Transport("one_sided")


def _host() -> str:
    """Of the running kernel: containers of one host have it in common."""
    return _BOOT_ID.read_text() if _BOOT_ID.is_file() else socket.gethostname()


def _has_symmetric_memory() -> bool:
    try:
        from torch.distributed import _symmetric_memory
    except ImportError:
        return False
    return hasattr(_symmetric_memory, "rendezvous") and hasattr(_symmetric_memory, "empty")


def _sees_peers(device: torch.device) -> bool:
    """Whether the GPUs that this process sees reach each other. One that sees only its own cannot say no."""
    others = [other for other in range(torch.cuda.device_count()) if other != device.index]
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)
