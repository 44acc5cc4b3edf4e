"""Five repairs to triton 3.6's interpreter, for loops over loaded bounds, bf16, e4m3, products and sorting on a CPU.

- numpy 2.4 no longer takes an array of shape [1] for an integer, and that is what a scalar is: loop bounds fail.
- fp32 is cut down to bf16, where a GPU rounds to the nearest even; and so are numbers of 8 bits taken for integers.
- `tl.dot` multiplies the bit patterns of bf16, for that is how they are held: uint16.
- The last bits of a row of a product depend on its place in the tile with some BLAS: they are summed in fp64, where
  products of 16-bit numbers are exact, and rounded once.
- `tl.sort` and `tl.topk` reduce by exclusive or, number by number in Python: minutes for one test.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def repair() -> None:
    """Change triton's interpreter in this process. Calling it twice changes nothing more."""
    if InterpreterBuilder.cast_impl is _cast:
        return
    patch_lang_tensor = interpreter._patch_lang_tensor

    def with_integers(tensor, scope) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_integers
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_to_fp = _cast
    InterpreterBuilder.create_dot = _dot
    apply_reduction = ReduceOps.apply_impl

    def reduce_at_once(self, inputs):
        if self.combine_fn != tl.standard._xor_combine:
            return apply_reduction(self, inputs)
        (x,) = inputs
        data = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return (self.to_tensor(data, x.dtype),)

    ReduceOps.apply_impl = reduce_at_once


def _dot(self, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *_precision) -> TensorHandle:
    """The builder's `create_dot`."""
    product = np.matmul(*(self.cast_impl(x, tl.float64).data for x in (a, b)))
    return TensorHandle(product.astype(acc.data.dtype) + acc.data, acc.dtype.scalar)


_BY_TORCH = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}


def _cast(self, src: TensorHandle, dst_type: tl.dtype, rounding: object = None) -> TensorHandle:
    """The builder's `cast_impl` and `create_fp_to_fp`, bf16 and e4m3 by way of torch."""
    source, target = src.dtype.scalar, dst_type.scalar
    if source not in _BY_TORCH and target not in _BY_TORCH:
        return TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), target)
    values = torch.from_numpy(np.ascontiguousarray(src.data).reshape(src.data.shape).copy())
    if source in _BY_TORCH:
        values = values.view(_BY_TORCH[source][0])
    if target in _BY_TORCH:
        dtype, bits = _BY_TORCH[target]
        return TensorHandle(values.to(dtype).view(bits).numpy(), target)
    return TensorHandle(values.to(torch.float64).numpy().astype(interpreter._get_np_dtype(dst_type)), target)
