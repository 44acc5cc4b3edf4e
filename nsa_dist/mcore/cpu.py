"""Run Megatron-core where there is no CUDA: a laptop, a CI machine.

Megatron-core names the CUDA device in its optimizer, schedules, gradient buffers and checkpoints. Inside
`megatron_on_cpu()` those names mean the CPU. It does nothing at all on a machine with CUDA.

    what is replaced                                            who needs it
    torch.cuda.current_device, synchronize                      model building, checkpoints, pipeline stages
    torch.cuda.manual_seed, get_rng_state, set_rng_state        the random-state tracker, recompute
    torch.cuda.current_stream, default_stream, stream, Event    gradient buckets from megatron-core 0.19 on
    device="cuda", pin_memory=True, Tensor.cuda()               optimizer, schedules
    Tensor.type() answers "torch.cuda.FloatTensor"              gradient clipping, mixed precision

The last two are a torch function mode, which belongs to one thread: enter it in the thread that trains.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Inside, Megatron-core runs on the CPU; afterwards torch is as it was. Nothing happens where CUDA is available."""
    if torch.cuda.is_available():
        yield
        return
    import megatron.core.tensor_parallel.random as megatron_random

    with ExitStack() as stack:
        for name, value in _cuda_replacements().items():
            stack.enter_context(replaced(torch.cuda, name, value))
        for name, value in (("_get_cuda_rng_state", _get_state), ("_set_cuda_rng_state", _set_state)):
            stack.enter_context(replaced(megatron_random, name, value))
        stack.enter_context(_CudaMeansCpu())
        yield


def _cuda_replacements() -> dict[str, Callable[..., Any]]:
    return {
        "current_device": lambda: _CPU,  # Megatron only ever passes it on as `device=`
        "synchronize": lambda device=None: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": _get_state,
        "set_rng_state": _set_state,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "Stream": _NoStream,
        "Event": _NoStream,
        "stream": lambda stream: nullcontext(),
    }


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


class _NoStream:
    """A stream or event of a device that does everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "_NoStream") -> None:
        pass

    def wait_event(self, event: "_NoStream") -> None:
        pass

    def record_event(self, event: "_NoStream | None" = None) -> "_NoStream":
        return event or self

    def record(self, stream: "_NoStream | None" = None) -> None:
        pass

    def wait(self, stream: "_NoStream | None" = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _CudaMeansCpu(TorchFunctionMode):
    """Reads "cuda" as "cpu" in every call of a torch function on this thread."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or torch.device(device).type == "cuda"):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Inside, `module.name` is `value`; afterwards what it was."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
