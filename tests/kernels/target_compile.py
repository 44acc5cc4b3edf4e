"""Compiles every plain kernel for a GPU that is not here, with the tiles it would pick there; prints what each needs.

    python target_compile.py sm_80 [BRANCH | wide]      of a layer's calls those of a branch; other groups and head dims

A launch compiles and does not run: the driver is a stand-in, and tensors are on the CPU. A line a compiled kernel is
its name and the bytes of shared memory that a program of it needs. A process of its own, as the tests beside it run in
triton's interpreter.
"""

import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import JITFunction

from nsa_kernels.common import device

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
failed: list[str] = []


class _Driver:
    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 2**31})

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def _compile(kernel: JITFunction, grid):
    from parameters import check_parameters

    def launch(*args, **options):
        assert not isinstance(kernel, GluonJITFunction), f"{kernel.fn.__name__} is for Hopper GPUs alone"
        name = f"{kernel.fn.__module__.removeprefix('nsa_kernels.')}.{kernel.fn.__name__}"
        try:
            compiled = kernel.warmup(*args, grid=grid, **options)
        except Exception as error:
            failed.append(f"{name} with {options}: {type(error).__name__}: {error}")
            return
        if compiled.metadata.target.backend == "cuda":
            check_parameters(compiled, kernel, args, options)
        print(name, compiled.metadata.shared, flush=True)

    return launch


def compile_layer(group: int, dim_k: int, dim_v: int, only: str) -> None:
    """Every call of a layer, forward and backward, in bf16; `only` those of a branch, if one is named."""
    from nsa_kernels.bench.cases import Case
    from nsa_kernels.bench.compile import branches_alone

    for branch in branches_alone(Case(256, 2 * group, 2, dim_k, dim_v), "cpu"):
        if only not in ("", branch.name):
            continue
        output = branch.forward()
        if branch.leaves:
            branch.backward(output, torch.ones_like(output[0] if isinstance(output, tuple) else output))()
    if only in ("", "gates"):
        compile_gates(2 * group, dim_v)


def compile_gates(num_q_heads: int, dim_v: int) -> None:
    """The branches under their gates, whose gradients the layer takes together with those of the branches."""
    from nsa_kernels.gates.combine import combine

    shapes = [(256, num_q_heads, 3), *[(256, num_q_heads, dim_v)] * 3]
    out = combine(*(torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes))
    out.backward(torch.ones_like(out))


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    triton.runtime.driver.set_active(_Driver(target))
    device.backend = lambda: target.backend  # before any module takes it from there
    JITFunction.__getitem__ = _compile
    which = sys.argv[2] if len(sys.argv) > 2 else ""
    for case in [(1, 192, 128), (64, 256, 256), (4, 64, 64)] if which == "wide" else [(16, 128, 128)]:
        compile_layer(*case, "" if which == "wide" else which)
    sys.exit("\n".join(failed) or 0)
