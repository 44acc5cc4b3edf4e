"""What the kernels over compressed blocks share: rows of a tile, head dims in two parts, checks of arguments."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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


def check_gradients(
    grad_out: Tensor, gate: Tensor | None, delta: Tensor, softmax_lse: Tensor, q: Tensor, v: Tensor
) -> None:
    """ValueError on what a backward over compressed blocks does not take beside its forward's inputs."""
    if grad_out.shape != (*q.shape[:2], v.shape[2]) or grad_out.dtype != q.dtype:
        raise ValueError(
            f"grad_out {grad_out.dtype} {tuple(grad_out.shape)} must be {q.dtype} [T, Hq, Dv] = "
            f"{[*q.shape[:2], v.shape[2]]}, the gradient of the output in its own dtype; cast or reshape it"
        )
    for name, statistic in (("delta", delta), ("softmax_lse", softmax_lse)):
        if statistic.shape != q.shape[:2] or statistic.dtype != torch.float32:
            raise ValueError(
                f"{name} {statistic.dtype} {tuple(statistic.shape)} must be float32 [T, Hq] = {list(q.shape[:2])}, one "
                f"number per row, or P and dS lose digits; take softmax_lse from the forward and sum delta in fp32"
            )
    if gate is not None and gate.shape != q.shape[:2]:
        raise ValueError(
            f"gate {tuple(gate.shape)} must be [T, Hq] = {list(q.shape[:2])}, one number per row; pass one branch's "
            f"column gates[:, :, b], or None for 1"
        )


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
