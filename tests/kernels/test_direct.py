"""A launch that lies ready, read back as the driver would read it. That its parameters are those of each compiled
kernel is in `hopper_compile` and `target_compile`; that it computes the same, on a GPU, in `tests/test_tapes.py`."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from nsa_kernels.common import direct
from nsa_kernels.common.launch import Launch

SIGNATURE = {
    "scale": "fp32", "x": "*bf16", "tiles": "tensordesc<bf16[1, 1, 64]>", "count": "i32", "one": "constexpr",
    "flag": "i1", "far": "i64", "BLOCK": "constexpr",
}  # fmt: skip
METADATA = {
    "num_warps": 4, "num_ctas": 1, "shared": 1024, "launch_pdl": True, "launch_cooperative_grid": False,
    "global_scratch_size": 0, "profile_scratch_size": 0, "tensordesc_meta": [{"swizzle": 3}],
}  # fmt: skip


class Driver:
    """Notes what it is handed; a descriptor is its tensor's address, 16 times."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.moves = 0
        self.functions = direct.Driver(self.launch, self.move, self.encoded)

    def launch(self, configuration: int, function: int, parameters: int) -> None:
        given = direct._Configuration.from_address(configuration)
        attributes = [(given.attributes[i].id, given.attributes[i].value) for i in range(given.num_attributes)]
        shape = (*given.grid, *given.block, given.shared_bytes)
        places = (ctypes.c_void_p * 14).from_address(parameters)
        kinds = [ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64 * 16, *3 * [ctypes.c_int32], *3 * [ctypes.c_int64]]
        kinds += [ctypes.c_int32, ctypes.c_int8, ctypes.c_int64, *2 * [ctypes.c_uint64]]
        values = [kind.from_address(place) for kind, place in zip(kinds, places, strict=True)]
        assert places[2] % 64 == 0
        read = [tuple(x) if isinstance(x, ctypes.Array) else x.value for x in values]
        self.launches.append((shape, given.stream, attributes, function, read))

    def move(self, descriptor: int, address: int) -> None:
        self.moves += 1
        (ctypes.c_uint64 * 16).from_address(descriptor)[:] = [address] * 16

    def encoded(self, x, meta) -> bytes:
        assert meta == {"swizzle": 3}
        return bytes((ctypes.c_uint64 * 16)(*[x.base.data_ptr()] * 16))


def launch_of(signature=SIGNATURE, **metadata) -> Launch:
    compiled = SimpleNamespace(
        src=SimpleNamespace(signature=signature), metadata=SimpleNamespace(**METADATA | metadata)
    )
    return Launch(None, 77, None, (5, 6, 7), (64,), compiled)


def test_the_driver_reads_what_was_given_and_where_tensors_lie_now():
    driver, x, y = Driver(), torch.zeros(64), torch.zeros(64)
    tiles = SimpleNamespace(base=y, shape=[2, 4, 64], strides=[256, 64, 1])
    ready = direct.Ready(launch_of(), (0.25, x, tiles, -3, 1, True, 2**40), driver.functions)
    moved = [x.data_ptr(), y.data_ptr()], [x.data_ptr() + 16, y.data_ptr() + 32], [x.data_ptr(), y.data_ptr() + 32]
    for stream, (of_x, of_y) in enumerate(moved, 9):
        ready.tensors[1].put(of_x)
        ready.tensors[2].put(of_y)
        ready(stream)
    assert driver.moves == 1, "where the address is the last one's, nothing is asked of the driver"
    for stream, (launch, (of_x, of_y)) in enumerate(zip(driver.launches, moved, strict=True), 9):
        values = [0.25, of_x, 16 * (of_y,), 2, 4, 64, 256, 64, 1, -3, 1, 2**40, 0, 0]
        shape, *rest, read = launch
        assert shape == (5, 6, 7, 128, 1, 1, 1024)
        assert rest == [stream, [(direct._DEPENDENT, 1)], 77]
        assert read == values


def test_a_launch_without_attributes_and_descriptors():
    compiled = launch_of({"x": "*i32"}, launch_pdl=False, tensordesc_meta=None)
    noted = []
    driver = direct.Driver(lambda *given: noted.append(given), None, None)
    ready = direct.Ready(Launch(None, 3, None, (1, 1, 1), (), compiled.compiled), (torch.zeros(4),), driver)
    ready(0)
    assert direct._Configuration.from_address(noted[0][0]).num_attributes == 0
    assert [x.size for x in ready.parameters] == [8, 8, 8]


@pytest.mark.parametrize(
    ("signature", "metadata"),
    [
        (SIGNATURE, {"num_ctas": 2}),
        (SIGNATURE, {"global_scratch_size": 8}),
        (SIGNATURE, {"profile_scratch_size": 8}),
        (SIGNATURE, {"tensordesc_meta": [None]}),
        (SIGNATURE, {"tensordesc_meta": None}),
        (SIGNATURE | {"half": "fp16"}, {}),
        (SIGNATURE | {"pair": ("*i32", "i32")}, {}),
    ],
)
def test_what_only_the_compilers_own_launcher_knows_is_left_to_it(signature, metadata, monkeypatch):
    monkeypatch.setattr(direct.triton, "__version__", "3.6.0")
    assert direct.takes(launch_of())
    assert not direct.takes(launch_of(signature, **metadata))


def test_other_versions_and_other_cards_go_through_triton(monkeypatch):
    for version, takes in (("3.6.1", True), ("3.7.1", True), ("3.9.0", False), ("3.60.0", False)):
        monkeypatch.setattr(direct.triton, "__version__", version)
        assert direct.takes(launch_of()) == takes
    monkeypatch.setattr(direct.triton, "__version__", "3.6.0")
    monkeypatch.setattr(direct, "backend", lambda: "hip")
    assert not direct.takes(launch_of())
    assert direct.ready(Launch(None, 0, None, (1, 1, 1), ()), ()) is None
