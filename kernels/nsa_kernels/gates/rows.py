"""What the one-pass kernels over (token, head) rows share: loads of rows, and checks of what they take."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.rows import unit_stride


@triton.jit
def load_rows(x_ptr, token, head, stride_t, stride_h, mask, dim):
    """Rows [BLOCK_M, BLOCK_D] of x [T, H, D], in fp32."""
    rows = x_ptr + token * stride_t + head * stride_h
    return tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)


def rows_of_one_shape(names: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors with a last stride of 1; ValueError unless all are [T, Hq, D] of a dtype that the kernels take."""
    shapes, dtypes = [tuple(t.shape) for t in tensors], [t.dtype for t in tensors]
    if len(set(shapes)) > 1 or not set(dtypes) <= {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(
            f"{names} are {shapes} of {dtypes}: the kernel needs one shape [T, Hq, D], and each of bf16, fp16 or fp32, "
            f"because it adds up row by row in fp32; reshape or cast them, or use nsa_kernels.reference for fp64"
        )
    return [unit_stride(t) for t in tensors]


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, dense_rows: bool = True) -> None:
    """ValueError unless results of `dtype` can be written into `out`, whose last stride must be 1 if `dense_rows`."""
    if tuple(out.shape) != shape or out.dtype != dtype or (dense_rows and out.stride(-1) != 1):
        row = " with a last stride of 1" if dense_rows else ""
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}, but must be {dtype} {shape}{row}, for "
            f"the result is written where it lies, as it is; pass such a tensor or view, or none"
        )
