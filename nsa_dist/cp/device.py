"""A stream beside the one that computes, and copies between host and device that stop neither. On a CPU: nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor


@cache
def _transfer_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device, because memory freed on a stream is used again on that stream only.

    Before others: a GPU begins all programs of a kernel before those of a later one, so a chain of small kernels, each
    of which other ranks wait for, would take a step only whenever a long one has begun its last.
    """
    return torch.cuda.Stream(device, priority=-1)


class Side:
    """The stream on which transfers are prepared, so that they need not queue behind what the device computes.

    What is allocated here is freed here: call `follow` after the last use elsewhere, before the last reference goes.
    """

    def __init__(self, device: torch.device):
        self._stream = _transfer_stream(device) if device.type == "cuda" else None

    def entered(self) -> AbstractContextManager:
        """A block whose work goes to this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def follow(self) -> None:
        """What is queued here from now on waits for all that is queued on the current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))


class CopyToHost:
    """`x` on its way to the CPU, through pinned memory, in the order of the current stream. On a CPU: `x` itself.

    Keeps `x` alive until the copy was waited for: its memory may belong to another stream than the copy.
    """

    def __init__(self, x: Tensor):
        self._source: Tensor | None = x
        self._host, self._copied = x, None
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        """The copy; the host waits until it has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        self._source = None
        return self._host


@contextmanager
def on_host() -> Iterator[None]:
    """Inside, new tensors are on the CPU, and none is an inference tensor, which no later backward could save.

    Each `torch.device` that is entered sends all calls of torch through Python, so one that changes nothing is not.
    """
    is_cpu = torch.get_default_device().type == "cpu"
    with torch.inference_mode(False), nullcontext() if is_cpu else torch.device("cpu"):
        yield


def put_on(device: torch.device, x: Tensor) -> Tensor:
    """`x` of the CPU on `device`, in the order of the current stream; the host waits for nothing.

    A strided `x` would be pinned with its strides, and copied through memory that is not pinned, behind the stream.
    """
    return x.contiguous().pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
