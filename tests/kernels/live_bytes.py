"""Bytes of all tensors alive at once, without a GPU's allocator to ask: every operation is watched."""

import gc
import sys

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """`peak`: the most that was alive after any operation inside. Tensors that no operation met do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if _inside_a_kernel():
            return result
        for x in tree_iter((args, result)):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self._alive() > self.peak:
            gc.collect()  # the interpreter leaves a kernel's arguments in reference cycles
            self.peak = max(self.peak, self._alive())
        return result

    def _alive(self) -> int:
        self._known = {k: v for k, v in self._known.items() if not v[0].expired()}
        return sum(num_bytes for _, num_bytes in self._known.values())


def _inside_a_kernel() -> bool:
    """Whether triton's interpreter is at work: what it allocates stands for registers."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith("interpreter.py"):
            return True
        frame = frame.f_back
    return False
