"""Launches of what triton has compiled, without triton's dispatch.

At every call `kernel[grid](...)` of triton works out anew which compiled kernel the arguments mean: 30 to 40 us of a
launch's 60 on the host of an H200 (triton 3.6, docs/decisions/host-time.md). Here the answer is kept, under all that
triton compiles for: the values of numbers and constants, dtypes, whether addresses are multiples of 16, tiles of tensor
descriptors. Whatever was not launched before goes through triton.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nsa_kernels.common.device import backend

_MOST_KEPT = 1024  # of one kernel; lengths that never come back must not fill the memory


@dataclass(frozen=True)
class Launch:
    """A kernel that is loaded on a device, and its grid. Called with a stream and all arguments but constants."""

    run: Callable[..., None]
    function: int
    metadata: Any
    grid: tuple[int, int, int]
    constants: tuple  # the parameters that were given by name, in the order of the signature
    compiled: Any = None  # triton's, of which `direct` reads what each parameter is; None: of a made-up kernel

    def __call__(self, stream: int, arguments: Sequence[Any]) -> None:
        self.run(
            *self.grid, stream, self.function, self.metadata, None, None, None, *arguments, *self.constants
        )  # fmt: skip


class Listener:
    """A dispatch mode of torch's that is told of launches, too."""

    def launched(self, launch: Launch, arguments: Sequence[Any]) -> None:
        raise NotImplementedError


class Kernel:
    """A kernel of triton or Gluon, launched as they are: `kernel[grid](*arguments, **constants)`.

    Arguments come in the order of the kernel's parameters; constants, which follow them, and triton's options
    (num_warps) by name.
    """

    def __init__(self, jit: JITFunction) -> None:
        self.jit = jit
        self._launches: dict[tuple, Launch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            device = driver.active.get_current_device()
            key = (device, grid, *_meanings(arguments), *options, *options.values())
            known = self._launches.get(key)
            if known is None or is_watched() or self.jit.pre_run_hooks:
                known = self._launched_by_triton(key, grid, arguments, options)
            else:
                known(driver.active.get_current_stream(device), arguments)
            listener = _get_current_dispatch_mode()
            if isinstance(listener, Listener) and known is not None:
                listener.launched(known, arguments)

        return launch

    def _launched_by_triton(
        self, key: tuple, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]
    ) -> Launch | None:
        if backend() != "cuda":  # others' compilers know no limit of registers
            options = {name: option for name, option in options.items() if name != "maxnreg"}
        compiled = self.jit[grid](*arguments, **options)
        if not hasattr(compiled, "packed_metadata"):  # of a stand-in that only compiles
            return None
        if len(self._launches) >= _MOST_KEPT:
            self._launches.clear()
        constants = tuple(options[parameter.name] for parameter in self.jit.params[len(arguments) :])
        x, y, z = (*grid, 1, 1)[:3]
        launch = Launch(compiled.run, compiled.function, compiled.packed_metadata, (x, y, z), constants, compiled)
        self._launches[key] = launch
        return launch


def launchable(jit: JITFunction) -> Any:
    """The `Kernel` of a jitted function; itself in triton's interpreter, which compiles nothing."""
    return Kernel(jit) if isinstance(jit, JITFunction) else jit


def is_watched() -> bool:
    """Whether somebody is to be told of every launch, such as triton's profiler."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _meanings(arguments: tuple) -> list:
    """What the compiler sees of each argument."""
    found: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            found += (x.dtype, x.data_ptr() % 16 == 0)
        elif hasattr(x, "block_shape"):
            found += (x.base.dtype, *x.block_shape)
        else:
            found.append(x)
    return found
