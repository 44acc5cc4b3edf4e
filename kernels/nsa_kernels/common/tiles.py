"""Tiles: the rows of one, head dims in two parts, and what the bulk copy engine reads."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa_kernels.common.sizes import split_head_dim


@triton.jit
def row_offsets(rows, head, stride_t, stride_h, G: tl.constexpr):
    """Offsets of rows of key-value head `head` in a [T, Hq, ...] tensor: row r is query r // G, head r % G."""
    return (rows // G).to(tl.int64) * stride_t + (head * G + rows % G).to(tl.int64) * stride_h


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products in full; tensor cores take the other dtypes as they are."""
    return "ieee" if dtype == torch.float32 else "tf32"


def copyable_by_tma(x: Tensor) -> Tensor:
    """`x` [rows, heads, dim] itself where the bulk copy engine can read it, else a dense copy.

    The engine wants a dense last dim and other strides, and the address, in multiples of 16 bytes. Heads cut from a
    fused projection are so; an expanded gradient, whose strides are 0, is not.
    """
    strides_fit = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return (
        x
        if x.stride(-1) == 1 and strides_fit and x.data_ptr() % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def tile_descriptor(x: Tensor, rows: int, heads: int, dims: int) -> TensorDescriptor:
    """Tiles [rows, heads, dims] of `x` [rows, heads, dim]; rows past the end read as 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, heads, dims])


def kv_descriptors(k: Tensor, v: Tensor, block_n: int) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """Tiles of `block_n` rows of one head: of both parts of k's head dim (the first again if it has one), and of v."""
    dim_a, dim_b = split_head_dim(k.shape[2])
    return (
        tile_descriptor(k, block_n, 1, dim_a),
        tile_descriptor(k, block_n, 1, dim_b or dim_a),
        tile_descriptor(v, block_n, 1, v.shape[2]),
    )
