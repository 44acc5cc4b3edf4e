"""What the kernels over compressed blocks share: rows of a tile, head dims in two parts, checks of arguments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def row_offsets(rows, head, stride_t, stride_h, G: tl.constexpr):
    """Offsets of rows of key-value head `head` in a [T, Hq, ...] tensor: row r is query r // G, head r % G."""
    return (rows // G).to(tl.int64) * stride_t + (head * G + rows % G).to(tl.int64) * stride_h


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """A head dim as the sum of two powers of two that a tile can hold, the second possibly 0.

    >>> split_head_dim(128), split_head_dim(192)
    ((128, 0), (128, 64))
    """
    first = 1 << (head_dim.bit_length() - 1)
    second = head_dim - first
    if first < 16 or (second and (second < 16 or second & (second - 1))):
        raise ValueError(
            f"head_dim={head_dim} must be a power of two of at least 16, or the sum of two of them such as 192 = 128 + "
            f"64, because tiles have power-of-two sides and tensor cores take 16 numbers at a time; pad the head dim"
        )
    return first, second


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself where its last dim is dense, else a copy: an expanded gradient has strides of 0 there."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, softmax_scale: float) -> None:
    """ValueError on shapes, dtypes and sizes that the kernels over compressed blocks do not take."""
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: the key-value heads must divide "
            f"the query heads, k and v must have the same rows and heads, q and k the same head dim"
        )
    check_dtypes(q=q, k=k, v=v)
    if v.shape[2] < 16 or v.shape[2] & (v.shape[2] - 1):
        raise ValueError(f"v has head_dim={v.shape[2]}, which must be a power of two of at least 16; pad it with zeros")
    check_intervals(q, begin, end, softmax_scale)


def check_intervals(q: Tensor, begin: Tensor, end: Tensor, softmax_scale: float) -> None:
    if begin.shape != q.shape[:1] or end.shape != q.shape[:1] or {begin.dtype, end.dtype} != {torch.int32}:
        raise ValueError(
            f"begin {begin.dtype} {tuple(begin.shape)} and end {end.dtype} {tuple(end.shape)} must be int32 "
            f"[T] = [{q.shape[0]}], one interval of key rows per query; build them with dtype=torch.int32"
        )
    if softmax_scale <= 0:
        raise ValueError(
            f"softmax_scale={softmax_scale} must be positive, because the largest score is looked for before scaling; "
            f"pass a positive scale and negate q instead"
        )


def check_dtypes(**tensors: Tensor) -> None:
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(KERNEL_DTYPES):
        given = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(
            f"{given}: all must have one dtype out of bfloat16, float16 and float32, which is what the tensor cores "
            f"take together; cast them first (fp64 is for nsa_kernels.reference)"
        )
