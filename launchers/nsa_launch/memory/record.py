"""What a rank that ran out of memory writes down before it fails."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsa_launch.run_folder import RunFolder

_LONGEST = 400  # characters of torch's message
# "CUDA error: out of memory", NCCL's "Cuda failure 2 'out of memory'", "Triton Error [CUDA]: out of memory"
_FULL = re.compile(r"cuda.{0,40}out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE | re.DOTALL)


@contextmanager
def out_of_memory_noted(folder: RunFolder, rank: int, device: torch.device) -> Iterator[None]:
    """Inside, an exception of full memory (`is_out_of_memory`) is entered in launches.jsonl and goes on its way."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            text = " ".join(str(error).split())[:_LONGEST]
            folder.record("out_of_memory", rank=rank, host=socket.gethostname(), text=text, **memory_of(device))
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU without room for a tensor, or for what CUDA, cuBLAS, NCCL or triton takes past torch's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None
    )


def memory_of(device: torch.device) -> dict[str, Any]:
    """Bytes: the most that torch's tensors took, what its allocator held at most, the device's own size, and what is
    held of it now past this process's allocator: by CUDA, by NCCL, by other processes."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    free_bytes, device_bytes = torch.cuda.mem_get_info(device)
    return {
        "peak_bytes": stats.get("allocated_bytes.all.peak", 0),
        "reserved_bytes": stats.get("reserved_bytes.all.peak", 0),
        "device_bytes": device_bytes,
        "outside_bytes": device_bytes - free_bytes - torch.cuda.memory_reserved(device),
    }
