"""What a rank that ran out of memory writes down before it fails."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsa_launch.run_folder import RunFolder

_LONGEST = 400  # characters of torch's message


@contextmanager
def out_of_memory_noted(folder: RunFolder, rank: int, device: torch.device) -> Iterator[None]:
    """Inside, a torch.OutOfMemoryError is entered in launches.jsonl and goes on its way."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = " ".join(str(error).split())[:_LONGEST]
        folder.record("out_of_memory", rank=rank, host=socket.gethostname(), text=text, **memory_of(device))
        raise


def memory_of(device: torch.device) -> dict[str, Any]:
    """Bytes: the most that torch's tensors took, what its allocator held at most, the device's own size."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    return {
        "peak_bytes": stats.get("allocated_bytes.all.peak", 0),
        "reserved_bytes": stats.get("reserved_bytes.all.peak", 0),
        "device_bytes": torch.cuda.mem_get_info(device)[1],
    }
