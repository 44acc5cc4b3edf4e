"""Runs a script of Megatron-LM where there is no GPU: `python megatron_lm_on_cpu.py SCRIPT [ARGUMENT ...]`.

`megatron_on_cpu` is enough for Megatron-core; Megatron-LM's training loop also asks the GPU for its name, its memory
and the time, and makes tensors by their old CUDA names. It gets answers here; what is computed is computed by torch.
"""

import importlib
import runpy
import sys
import typing
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

from nsa_dist.mcore.cpu import megatron_on_cpu


class NoStream:
    """A stream or an event of a device that does everything in order, and takes no time."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0

    def __getattr__(self, name):  # wait_stream, record_event, synchronize, ...
        return lambda *args, **kwargs: None


def of_dtype(dtype):
    return lambda data=(), **kwargs: torch.tensor(data, dtype=dtype)


def answers() -> dict:
    nothing = {"set_device", "reset_peak_memory_stats", "empty_cache", "ipc_collect", "set_stream", "synchronize"}
    zeros = {"memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "utilization"}
    about = SimpleNamespace(major=9, minor=0, total_memory=1 << 36, multi_processor_count=1, name="cpu")
    dtypes = {"Float": torch.float32, "Long": torch.int64, "Int": torch.int32, "Double": torch.float64}
    return {
        **{name: lambda *args, **kwargs: None for name in nothing},
        **{name: lambda *args, **kwargs: 0 for name in zeros},
        **{f"{name}Tensor": of_dtype(dtype) for name, dtype in {**dtypes, "Byte": torch.uint8}.items()},
        **dict.fromkeys(("Stream", "Event", "current_stream", "default_stream"), NoStream),
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "memory_stats": lambda *args, **kwargs: {},
        "mem_get_info": lambda *args: (1 << 35, 1 << 36),
        "get_device_name": lambda *args: about.name,
        "get_device_capability": lambda *args: (about.major, about.minor),
        "get_device_properties": lambda *args: about,
    }


def main() -> None:
    if not hasattr(typing, "override"):  # Megatron-LM of core 0.19 is for Python 3.12; it names nothing else of it
        typing.override = lambda function: function
    script, sys.argv = sys.argv[1], sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    with megatron_on_cpu():
        for name, answer in answers().items():
            setattr(torch.cuda, name, answer)
        torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None
        torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None  # asks the driver
        if find_spec("megatron.legacy"):  # of 0.16: compiles CUDA code that nothing here calls
            importlib.import_module("megatron.legacy.fused_kernels").load = lambda args: None
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
