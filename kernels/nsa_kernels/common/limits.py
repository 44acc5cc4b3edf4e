"""What these kernels can take of what `contracts` allows, and what to do about the rest."""

import torch
from torch import Tensor

from nsa_kernels.common.sizes import split_head_dim
from nsa_kernels.contracts import IntervalCall, SelectedCall, SelectionCall, Upstream

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_interval(call: IntervalCall) -> None:
    """ValueError unless the interval kernels take it."""
    check_dtypes(q=call.q, k=call.k, v=call.v)
    check_head_dim("Dk", call.q.shape[2], two=True)
    check_head_dim("Dv", call.v.shape[2], two=False)
    _check_bounds(call.begin, call.end)
    _check_scale(call.softmax_scale)


def check_upstream(upstream: Upstream, q: Tensor) -> None:
    """ValueError unless the interval kernels' backward takes it."""
    if upstream.grad_out.dtype != q.dtype:
        raise ValueError(
            f"grad_out of {upstream.grad_out.dtype} must be {q.dtype}, the gradient of the output in its own dtype; "
            f"cast it, for the tensor cores multiply it with q and v"
        )
    for name, statistic in (("delta", upstream.delta), ("softmax_lse", upstream.softmax_lse)):
        if statistic.dtype != torch.float32:
            raise ValueError(
                f"{name} of {statistic.dtype} must be fp32, or P and dS lose digits: take softmax_lse from the "
                f"forward, and sum delta in fp32, or pass a column of gate_deltas"
            )


def check_selected(call: SelectedCall) -> None:
    """ValueError unless the kernels of selected attention take it."""
    check_dtypes(q=call.q, k=call.k, v=call.v)
    length, rows = call.slc_block_len, call.k.shape[0]
    if length < 16 or length & (length - 1) or rows % length:
        raise ValueError(
            f"slc_block_len={length} must be a power of two from 16 on and divide the {rows} rows of k, because a page "
            f"is one tile; pad each document to whole blocks, or use nsa_kernels.reference"
        )
    _check_scale(call.softmax_scale)
    check_head_dim("Dk", call.q.shape[2], two=True)
    check_head_dim("Dv", call.v.shape[2], two=False)


def check_selection(call: SelectionCall) -> None:
    """ValueError unless the kernels of the selection take it."""
    check_dtypes(q=call.q, k_cmp=call.k_cmp)
    check_head_dim("Dk", call.q.shape[2], two=True)
    _check_bounds(call.cmp_begin, call.cmp_end)
    _check_scale(call.softmax_scale)
    if call.lse_cmp.dtype != torch.float32:
        raise ValueError(
            f"lse_cmp of {call.lse_cmp.dtype} must be the float32 that compressed_attention returned for the same q, "
            f"or probabilities do not add up to one; pass that one"
        )


def check_dtypes(**tensors: Tensor) -> None:
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(KERNEL_DTYPES):
        given = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(
            f"{given}: all must have one dtype out of bfloat16, float16 and float32, which is what the tensor cores "
            f"take together; cast them first (fp64 is for nsa_kernels.reference)"
        )


def check_head_dim(name: str, dim: int, *, two: bool) -> None:
    """two      whether the kernels take the sum of two powers of two, as 192 = 128 + 64"""
    second = split_head_dim(dim)[1]
    if dim < 16 or (second and (not two or second < 16 or second & (second - 1))):
        what = "a power of two of at least 16" + (", or the sum of two of them such as 192 = 128 + 64" if two else "")
        raise ValueError(
            f"{name}={dim} must be {what}, because tiles have power-of-two sides and tensor cores take 16 numbers at a "
            f"time; pad it with zeros, or pad the head dim of the model (nsa_kernels.reference takes any)"
        )


def _check_bounds(begin: Tensor, end: Tensor) -> None:
    for name, bound in (("begin", begin), ("end", end)):
        if bound.dtype != torch.int32:
            raise ValueError(
                f"{name} is {bound.dtype}, but the kernels read one int32 per query; build it with dtype=torch.int32, "
                f"or pass {name}.to(torch.int32)"
            )


def _check_scale(softmax_scale: float) -> None:
    if not softmax_scale > 0:
        raise ValueError(
            f"softmax_scale={softmax_scale} must be positive, because the largest score is looked for before scaling; "
            f"pass head_dim ** -0.5, or negate q"
        )
