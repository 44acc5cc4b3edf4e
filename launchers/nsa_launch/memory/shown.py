"""Out of memory, for people: planned beside used, and which key to change."""

from collections.abc import Iterator, Mapping
from typing import Any

from nsa_dist.planner.core.strategies import GIB
from nsa_dist.planner.shortage import Shortage, shortage
from nsa_launch.config import RunConfig

_SHOWN = 4  # ways to make room


def lines(config: RunConfig, event: Mapping[str, Any], world_size: int) -> list[str]:
    """Of an "out_of_memory" event of a run of `world_size` ranks."""
    head = f"rank {event['rank']} on {event['host']} ran out of memory: {event['text']}"
    if config.model.has_dense:
        return [head, *_dense(config)]
    nodes = config.launch.nodes if world_size % config.launch.nodes == 0 else 1
    device_bytes = int(event.get("device_bytes") or 0)
    planned = shortage(config, device_bytes or 2**62, nodes, world_size // nodes)
    others_bytes = max(0, int(event.get("outside_bytes") or 0) - int(planned.memory_bytes["reserved"]))
    table = list(_table(planned, event))
    if others_bytes:
        planned = shortage(config, device_bytes - others_bytes, nodes, world_size // nodes)
        table.append(
            f"  other processes hold about {_gib(others_bytes)} GiB of it: see nvidia-smi on {event['host']}, and end "
            f"them, or keep ranks off that GPU"
        )
    return [head, *table, *_remedies(planned, bool(device_bytes))]


def _dense(config: RunConfig) -> Iterator[str]:
    yield f"  the planner knows NSA layers alone, so there is no plan of model.attention={config.model.attention}"
    yield "  to make room: run.micro_batch_size=1, model.recompute_attention=true, or a shorter run.sequence_length"


def _table(planned: Shortage, event: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {'GiB of a rank':<34}{'planned':>9}{'used':>9}"
    for kind, num_bytes in planned.memory_bytes.items():
        if num_bytes:
            yield f"  {kind:<34}{_gib(num_bytes):>9}"
    used = event.get("peak_bytes")
    yield f"  {'all of it; used: the peak':<34}{_gib(planned.total_bytes):>9}{_gib(used) if used else 'unknown':>9}"
    if event.get("reserved_bytes"):
        yield f"  {'held by torch at most':<43}{_gib(event['reserved_bytes']):>9}"
    if event.get("device_bytes"):
        yield f"  {'the device has':<43}{_gib(event['device_bytes']):>9}"


def _remedies(planned: Shortage, is_size_known: bool) -> Iterator[str]:
    for remedy in planned.remedies[:_SHOWN]:
        verdict = "" if not is_size_known else ", which fits" if remedy.fits else ", which does not fit by itself"
        yield f"  to make room: {remedy.words} (planned {_gib(remedy.total_bytes)} GiB{verdict})"
    if not planned.remedies:
        yield "  the planner knows no single change that needs less: use more ranks or a smaller model"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f}"
