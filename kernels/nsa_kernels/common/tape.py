"""What a function launches, recorded once and then repeated on other tensors: the host does nothing else in between.

A short layer waits for its host: 14 launches of 4k tokens take an H200 1.0 ms, and Python 1.9 ms to prepare
(docs/decisions/host-time.md). For the same shapes it prepares the same launches each time, so they are kept:

    tapes = Tapes()
    out, lse = tapes.run(body, [q, k, v])   # the first call runs body, the second records it, later ones repeat

A tape repeats, in the same order, the launches of `launch.Kernel`s, torch's operators that compute, and when memory is
taken and let go. All else that body did is left out: it must be a function of the tensors that are handed to it, whose
launches depend on their shapes alone. Tensors that it reaches otherwise are constants; the tape keeps them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_iter, tree_unflatten
from triton.runtime import driver

from nsa_kernels.common.direct import Pointer, Ready, Tiles, ready
from nsa_kernels.common.launch import Launch, Listener, is_watched

_MOST_TAPES = 64  # of one `Tapes`: shapes that never come back must not fill the memory
_EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}

Body = Callable[[list[Tensor]], Sequence[Tensor]]
Step = Callable[[list, int], None]  # (what lies in the slots, stream)


class Tapes:
    """The tapes of one function, by what the tensors are like that it is given."""

    def __init__(self) -> None:
        self._tapes: dict[tuple, Tape | None] = {}

    def run(self, body: Body, inputs: list[Tensor]) -> Sequence[Tensor]:
        """`body(inputs)`, or what it would return. Not while gradients are recorded.

        A body must not write to its inputs. It may take them out of the list, whose tensors are then let go, in a
        repetition too, when it lets go of them.
        """
        if torch.is_grad_enabled() or is_watched() or _get_current_dispatch_mode() is not None:
            return body(inputs)
        device = driver.active.get_current_device()
        key = (device, *((x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in inputs))
        if key not in self._tapes:  # the first time, things are compiled and computed that later calls find done
            if len(self._tapes) >= _MOST_TAPES:
                self._tapes.clear()
            self._tapes[key] = None
            return body(inputs)
        tape = self._tapes[key]
        if tape is None:
            if _is_captured(inputs[0]):  # a CUDA graph would hold what is done with copies, too
                return body(inputs)
            tape = self._tapes[key] = Tape.of(body, inputs)
        return tape(body, inputs, driver.active.get_current_stream(device))


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the recording is to be found in a repetition: a view of what lies in a slot."""

    slot: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements behind the first of the slot's tensor
    is_whole: bool

    def of(self, slots: list) -> Tensor:
        x = slots[self.slot]
        return x if self.is_whole else x.as_strided(self.shape, self.stride, x.storage_offset() + self.offset)


class _Take:
    """Memory that nothing is written to yet."""

    def __init__(self, slot: int, x: Tensor) -> None:
        self._slot, self._shape, self._stride, self._dtype, self._device = slot, x.shape, x.stride(), x.dtype, x.device

    def __call__(self, slots: list, stream: int) -> None:
        slots[self._slot] = self._taken()

    def _taken(self) -> Tensor:
        return torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device=self._device)


class _Zeros(_Take):
    """Memory that is all 0."""

    def _taken(self) -> Tensor:
        return super()._taken().zero_()


@dataclass(frozen=True)
class _LetGo:
    slot: int

    def __call__(self, slots: list, stream: int) -> None:
        slots[self.slot] = None


@dataclass(frozen=True)
class _Operator:
    """One of torch's that computes."""

    function: Callable
    leaves: list  # of its arguments, a `_Place` for what lies in a slot
    structure: TreeSpec
    places: list[int]  # which of the leaves
    slots: tuple[int | None, ...]  # of what is new among the results

    def __call__(self, slots: list, stream: int) -> None:
        leaves = self.leaves.copy()
        for at in self.places:
            leaves[at] = leaves[at].of(slots)
        arguments, options = tree_unflatten(leaves, self.structure)
        results = self.function(*arguments, **options)
        for slot, x in zip(self.slots, results if isinstance(results, tuple | list) else (results,), strict=True):
            if slot is not None:
                slots[slot] = x


class _Address:
    """What stands for a tensor in a descriptor of its tiles."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


_Pointer = tuple[int, int, int]  # number of the argument, slot, bytes behind the first of the slot's tensor


@dataclass(frozen=True)
class _Launch:
    launch: Launch
    arguments: list  # None where one depends on a slot
    pointers: list[_Pointer]
    tiles: list[tuple[_Pointer, type, dict[str, Any], torch.dtype]]  # descriptors: their class, fields, dtype

    def __call__(self, slots: list, stream: int) -> None:
        arguments = self.arguments.copy()
        for number, slot, offset in self.pointers:
            arguments[number] = slots[slot].data_ptr() + offset
        for (number, slot, offset), kind, fields, dtype in self.tiles:
            descriptor: Any = object.__new__(kind)  # its sizes were checked when it was recorded
            vars(descriptor).update(fields, base=_Address(slots[slot].data_ptr() + offset, dtype))
            arguments[number] = descriptor
        self.launch(stream, arguments)


@dataclass(frozen=True)
class _ReadyLaunch:
    """A launch whose parameters lie ready for the driver."""

    launch: Ready
    tensors: list[tuple[Pointer | Tiles, int, int]]  # and the slot of each, bytes behind the first of its tensor

    def __call__(self, slots: list, stream: int) -> None:
        for tensor, slot, offset in self.tensors:
            tensor.put(slots[slot].data_ptr() + offset)
        self.launch(stream)


@dataclass(frozen=True)
class Tape:
    """The steps of one recording."""

    steps: list[Step]
    num_slots: int  # the first hold the inputs
    results: list[_Place | Tensor]
    constants: list[Tensor]  # kept for the addresses in the steps
    obstacle: str  # why the function cannot be repeated; empty if it can
    lock: Lock = field(default_factory=Lock)  # one thread at a time: addresses lie in the steps

    @classmethod
    def of(cls, body: Body, inputs: list[Tensor]) -> "Tape":
        """What `body` does with copies of `inputs`: what a launch is given then belongs to one of them alone."""
        if any(0 in x.stride() or x.data_ptr() % 16 for x in inputs):
            return cls([], 0, [], [], "an input that no copy is like")
        copies = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in inputs]
        with _Recording(copies) as recording:
            results = [recording.place_of(x) for x in body(copies)]
        return cls(recording.steps, recording.num_slots, results, recording.constants, recording.obstacle)

    def __call__(self, body: Body, inputs: list[Tensor], stream: int) -> Sequence[Tensor]:
        if self.obstacle:
            return body(inputs)
        slots: list[Tensor | None] = [*inputs, *[None] * (self.num_slots - len(inputs))]
        inputs.clear()
        with self.lock:
            for step in self.steps:
                step(slots, stream)
        return [place.of(slots) if isinstance(place, _Place) else place for place in self.results]


class _Recording(TorchDispatchMode, Listener):
    """Notes what happens to `inputs`, none of which may share memory with another."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.constants: list[Tensor] = []
        self.obstacle = ""
        self._begins: list[tuple[int, torch.Size, tuple[int, ...], torch.dtype]] = []  # of the tensor of each slot
        self._slot_at: dict[int, int] = {}  # by the address of the storage
        self._alive: dict[int, StorageWeakRef] = {}
        for x in inputs:
            self._new_slot(x)

    @property
    def num_slots(self) -> int:
        return len(self._begins)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._note_what_is_free()
        results = function(*args, **(kwargs or {}))
        if not _is_view(function):
            self._note(function, args, kwargs or {}, results)
        return results

    def launched(self, launch: Launch, arguments: Sequence[Any]) -> None:
        self._note_what_is_free()
        template = list(arguments)
        pointers: list[_Pointer] = []
        tiles: list[tuple[_Pointer, type, dict[str, Any], torch.dtype]] = []
        for number, x in enumerate(arguments):
            base = x if isinstance(x, Tensor) else getattr(x, "base", None)
            if base is None:
                continue
            slot = self._slot_of(base)
            if slot is None:
                self.constants.append(base)
                continue
            pointer = (number, slot, self._offset(slot, base))
            if isinstance(x, Tensor):
                pointers.append(pointer)
            else:
                tiles.append((pointer, type(x), {**vars(x), "base": None}, base.dtype))
            template[number] = None
        prepared = ready(launch, arguments)
        if prepared is None:
            self.steps.append(_Launch(launch, template, pointers, tiles))
        else:
            places = [*pointers, *(pointer for pointer, *_ in tiles)]
            self.steps.append(_ReadyLaunch(prepared, [(prepared.tensors[n], slot, at) for n, slot, at in places]))

    def place_of(self, x: Tensor) -> _Place | Tensor:
        """Where a repetition finds it; itself if it is a constant."""
        slot = self._slot_of(x)
        if slot is None:
            self.constants.append(x)
            return x
        _, shape, stride, dtype = self._begins[slot]
        if dtype != x.dtype:
            self.obstacle = self.obstacle or f"a view of {dtype} as {x.dtype}"
        offset = self._offset(slot, x) // x.element_size()
        return _Place(slot, x.shape, x.stride(), offset, offset == 0 and (x.shape, x.stride()) == (shape, stride))

    def _note(self, function, args: tuple, kwargs: dict[str, Any], results: Any) -> None:
        made = results if isinstance(results, tuple | list) else (results,)
        devices = {x.device for x in tree_iter((args, kwargs, made)) if isinstance(x, Tensor)}
        if len(devices) != 1 or not all(isinstance(x, Tensor) for x in made):
            self.obstacle = self.obstacle or f"{function}: the host waits for the device or hands it something"
        elif function.overloadpacket.__name__ in _EMPTY:
            self.steps.append(_Take(self._new_slot(made[0]), made[0]))
        elif function is torch.ops.aten.zeros.default:
            self.steps.append(_Zeros(self._new_slot(made[0]), made[0]))
        else:
            leaves, structure = tree_flatten((args, kwargs))
            leaves = [self.place_of(x) if isinstance(x, Tensor) else x for x in leaves]
            places = [at for at, x in enumerate(leaves) if isinstance(x, _Place)]
            slots = tuple(self._new_slot(x) if self._slot_of(x) is None else None for x in made)
            self.steps.append(_Operator(function, leaves, structure, places, slots))

    def _note_what_is_free(self) -> None:
        for slot in [slot for slot, storage in self._alive.items() if storage.expired()]:
            del self._alive[slot]
            self._slot_at = {address: at for address, at in self._slot_at.items() if at != slot}
            self.steps.append(_LetGo(slot))

    def _slot_of(self, x: Tensor) -> int | None:
        return self._slot_at.get(x.untyped_storage().data_ptr())

    def _offset(self, slot: int, x: Tensor) -> int:
        """Bytes from the first of the slot's tensor to that of `x`; torch says that a tensor without any is at 0."""
        return x.data_ptr() - self._begins[slot][0] if x.numel() else 0

    def _new_slot(self, x: Tensor) -> int:
        slot, storage = len(self._begins), x.untyped_storage()
        self._begins.append((x.data_ptr(), x.shape, x.stride(), x.dtype))
        self._slot_at[storage.data_ptr()] = slot
        self._alive[slot] = StorageWeakRef(storage)
        return slot


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_view(function) -> bool:
    returns = function._schema.returns
    return bool(returns) and all(x.alias_info is not None and not x.alias_info.is_write for x in returns)
