"""A launch that lies ready for the driver: everything written down once, addresses alone replaced.

Triton's launcher reads every argument of a launch anew, asks the driver whose memory each address is, and has
descriptors of tiles encoded. What is repeated has the same numbers each time, so what the driver reads, a configuration
and the bytes of each parameter, is kept; where a tensor lies elsewhere than the last time, its address is written over,
in a descriptor by the driver's own function for that.

The order of parameters is triton's and no promise of its own: it is known for the versions in `_KNOWN`, and others'
launches go through triton's launcher.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton

from nsa_kernels.common.device import backend
from nsa_kernels.common.launch import Launch

_KNOWN = {"3.6", "3.7"}
_NUMBERS = {
    **{kind + str(bits): getattr(ctypes, f"c_{name}{bits}") for kind, name in (("i", "int"), ("u", "uint"))
       for bits in (8, 16, 32, 64)},
    "i1": ctypes.c_int8, "u1": ctypes.c_uint8, "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
_DEPENDENT, _COOPERATIVE = 6, 2  # of CUlaunchAttributeID
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # of a CUtensorMap


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _Configuration(ctypes.Structure):
    """CUlaunchConfig of the driver."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Driver:
    """What is asked of libcuda. Each raises RuntimeError where the driver refuses."""

    launch: Callable[[int, int, int], None]  # (address of a configuration, function, address of those of parameters)
    move: Callable[[int, int], None]  # (address of a descriptor, where its tensor lies now)
    encoded: Callable[[Any, dict[str, Any]], bytes]  # (a descriptor of triton's, what was compiled of it): the driver's


@cache
def cuda_driver() -> Driver:
    library = ctypes.CDLL("libcuda.so.1")

    def checked(name: str, *types: Any) -> Callable[..., None]:
        function = getattr(library, name)
        function.argtypes = types

        def call(*arguments: Any) -> None:
            error = function(*arguments)
            if error:
                text = ctypes.c_char_p()
                library.cuGetErrorString(error, ctypes.byref(text))
                raise RuntimeError(f"{name}: {text.value.decode() if text.value else f'error {error}'}")

        return call

    launch = checked("cuLaunchKernelEx", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    move = checked("cuTensorMapReplaceAddress", ctypes.c_void_p, ctypes.c_void_p)
    return Driver(lambda *arguments: launch(*arguments, None), move, _encoded)


def _encoded(x: Any, meta: dict[str, Any]) -> bytes:
    """The bytes of the descriptor that triton has encoded of `x`, which it keeps behind the head of an object."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    made = make_tensordesc_arg(x, meta)[0]
    return ctypes.string_at(id(made) + type(made).__basicsize__ - _MAP_BYTES, _MAP_BYTES)


class Number:
    """A number among the parameters of a launch; `at` is where it lies and `size` its bytes, as of the others."""

    def __init__(self, number: Any) -> None:
        self._number = number
        self.at, self.size = ctypes.addressof(number), ctypes.sizeof(number)


class Pointer(Number):
    """The address of a tensor among them."""

    def __init__(self, address: int) -> None:
        super().__init__(ctypes.c_uint64(address))

    def put(self, address: int) -> None:
        self._number.value = address


class Tiles:
    """The descriptor of a tensor's tiles among them."""

    def __init__(self, encoded: bytes, address: int, driver: Driver) -> None:
        self.size = len(encoded)
        self._memory = ctypes.create_string_buffer(self.size + _MAP_ALIGNMENT)
        self.at = -(-ctypes.addressof(self._memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        ctypes.memmove(self.at, encoded, self.size)
        self._address, self._move = address, driver.move

    def put(self, address: int) -> None:
        if address != self._address:
            self._move(self.at, address)
            self._address = address


class Ready:
    """A launch with all of its parameters. `tensors[number].put(address)` says where that argument's tensor lies."""

    def __init__(self, launch: Launch, arguments: Sequence[Any], driver: Driver) -> None:
        self.tensors: dict[int, Pointer | Tiles] = {}
        self.parameters: list[Number | Tiles] = []  # as the kernel has them
        descriptors = iter(_descriptors(launch))
        for number, (kind, x) in enumerate(zip(_kinds(launch), (*arguments, *launch.constants), strict=True)):
            if kind.startswith("tensordesc"):
                self.tensors[number] = tiles = Tiles(driver.encoded(x, next(descriptors)), x.base.data_ptr(), driver)
                sizes = [*map(ctypes.c_int32, x.shape), *map(ctypes.c_int64, x.strides)]
                self.parameters += [tiles, *map(Number, sizes)]
            elif kind.startswith("*"):
                self.tensors[number] = pointer = Pointer(x.data_ptr())
                self.parameters.append(pointer)
            elif kind != "constexpr":
                self.parameters.append(Number(_NUMBERS[kind](x)))
        self.parameters += [Pointer(0), Pointer(0)]  # no scratch memory, of all programs or of a profiler
        self._addresses = (ctypes.c_void_p * len(self.parameters))(*(x.at for x in self.parameters))
        self._configuration = _configuration(launch)
        self._function, self._launch = launch.function, driver.launch
        self._places = ctypes.addressof(self._configuration), ctypes.addressof(self._addresses)

    def __call__(self, stream: int) -> None:
        self._configuration.stream = stream
        configuration, parameters = self._places
        self._launch(configuration, self._function, parameters)


def ready(launch: Launch, arguments: Sequence[Any]) -> Ready | None:
    """The launch with `arguments`; None where only triton's launcher knows how."""
    return Ready(launch, arguments, cuda_driver()) if takes(launch) else None


def takes(launch: Launch) -> bool:
    """Of a known triton, no kernel with memory of its own or in clusters, all parameters of kinds written above."""
    if backend() != "cuda" or launch.compiled is None or ".".join(triton.__version__.split(".")[:2]) not in _KNOWN:
        return False
    metadata, kinds, descriptors = launch.compiled.metadata, _kinds(launch), _descriptors(launch)
    return (
        metadata.num_ctas == 1
        and not metadata.global_scratch_size
        and not metadata.profile_scratch_size
        and all(descriptors)
        and sum(kind.startswith("tensordesc") for kind in kinds) == len(descriptors)
        and all(kind in _NUMBERS or kind == "constexpr" or kind.startswith(("*", "tensordesc")) for kind in kinds)
    )


def _kinds(launch: Launch) -> list[str]:
    """What each argument was compiled as; None, and a number that is 1, are constants."""
    return list(map(str, launch.compiled.src.signature.values()))


def _descriptors(launch: Launch) -> Sequence[dict[str, Any]]:
    """What was compiled of each descriptor of tiles."""
    return getattr(launch.compiled.metadata, "tensordesc_meta", None) or ()


def _configuration(launch: Launch) -> _Configuration:
    metadata = launch.compiled.metadata
    wanted = {_DEPENDENT: metadata.launch_pdl, _COOPERATIVE: metadata.launch_cooperative_grid}
    attributes = [_Attribute(id=name, value=1) for name, is_wanted in wanted.items() if is_wanted]
    return _Configuration(
        grid=launch.grid,
        block=(32 * metadata.num_warps, 1, 1),
        shared_bytes=metadata.shared,
        attributes=(_Attribute * len(attributes))(*attributes),
        num_attributes=len(attributes),
    )
