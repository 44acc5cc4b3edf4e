"""What stands around the branches' gradients, each in one pass: their deltas before them, the sum of dq after them.

    deltas[t, h, b] = sum_d d out[t, h, d] * out_b[t, h, d]         b in the order cmp, slc, win
    sum[t, h]       = cmp[t, h] + slc[t, h] + win[t, h]

Where `out` is the gated sum of `gates.combine`, deltas are the gradient of the gates, and a column of them the `delta`
of that branch's backward: d out is read once for all, and no gate * d out is ever written.

Shapes      d out, out_* [T, Hq, Dv]    deltas [T, Hq, 3]    cmp, slc, win, sum [T, Hq, D]
Dtypes      bf16, fp16 or fp32 each. Computed in fp32; deltas are fp32, sums are rounded once, to the dtype of cmp.
Strides     any over tokens and heads; tensors are copied where their last stride is not 1. New deltas are stored
            [3, T, Hq], so that the column of a branch is contiguous.
Bytes       deltas read 4 times T * Hq * Dv elements; sums read 3 and write 1 times T * Hq * D.
Reference   nsa_kernels.reference.gate_deltas, sum_branches
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.rows import row_blocks, token_head_strides, unit_stride


@triton.jit
def _load_rows(x_ptr, token, head, stride_t, stride_h, mask, dim):
    """Rows [BLOCK_M, BLOCK_D] of x [T, H, D], in fp32."""
    rows = x_ptr + token * stride_t + head * stride_h
    return tl.load(rows[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _deltas_kernel(
    grad_out_ptr,
    cmp_ptr,
    slc_ptr,
    win_ptr,
    deltas_ptr,
    stride_dt,
    stride_dh,
    stride_ct,
    stride_ch,
    stride_st,
    stride_sh,
    stride_wt,
    stride_wh,
    stride_ot,
    stride_oh,
    stride_ob,
    num_rows,
    num_heads,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The three deltas of BLOCK_M (token, head) rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // num_heads, row % num_heads
    dim = tl.arange(0, BLOCK_D)
    inside = row < num_rows
    mask = inside[:, None] & (dim < DIM)[None, :]
    grad_out = _load_rows(grad_out_ptr, token, head, stride_dt, stride_dh, mask, dim)
    out_cmp = _load_rows(cmp_ptr, token, head, stride_ct, stride_ch, mask, dim)
    out_slc = _load_rows(slc_ptr, token, head, stride_st, stride_sh, mask, dim)
    out_win = _load_rows(win_ptr, token, head, stride_wt, stride_wh, mask, dim)
    deltas = deltas_ptr + token * stride_ot + head * stride_oh
    tl.store(deltas, tl.sum(grad_out * out_cmp, 1), mask=inside)
    tl.store(deltas + stride_ob, tl.sum(grad_out * out_slc, 1), mask=inside)
    tl.store(deltas + 2 * stride_ob, tl.sum(grad_out * out_win, 1), mask=inside)


@triton.jit
def _sum_kernel(
    cmp_ptr,
    slc_ptr,
    win_ptr,
    out_ptr,
    stride_ct,
    stride_ch,
    stride_st,
    stride_sh,
    stride_wt,
    stride_wh,
    stride_ot,
    stride_oh,
    num_rows,
    num_heads,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sum of BLOCK_M (token, head) rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // num_heads, row % num_heads
    dim = tl.arange(0, BLOCK_D)
    mask = (row < num_rows)[:, None] & (dim < DIM)[None, :]
    total = _load_rows(cmp_ptr, token, head, stride_ct, stride_ch, mask, dim)
    total += _load_rows(slc_ptr, token, head, stride_st, stride_sh, mask, dim)
    total += _load_rows(win_ptr, token, head, stride_wt, stride_wh, mask, dim)
    out = out_ptr + token * stride_ot + head * stride_oh
    tl.store(out[:, None] + dim[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@torch.no_grad()
def gate_deltas(
    grad_out: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """`deltas[t, h, b] = rowsum(grad_out * out_b)`, fp32 [T, Hq, 3], of grad_out and out_* [T, Hq, Dv].

    out         fp32 [T, Hq, 3] of any strides, filled and returned; None: a new tensor
    Raises ValueError on shapes and dtypes that do not fit.
    """
    tensors = _rows_of_one_shape("grad_out and the branches", grad_out, out_cmp, out_slc, out_win)
    num_tokens, num_heads, _ = grad_out.shape
    if out is None:
        out = grad_out.new_empty(3, num_tokens, num_heads, dtype=torch.float32).permute(1, 2, 0)
    check_out(out, (num_tokens, num_heads, 3), torch.float32, dense_rows=False)
    if out.numel():
        grid, dims = row_blocks(grad_out)
        strides = (*token_head_strides(*tensors), *out.stride())
        _deltas_kernel[grid](*tensors, out, *strides, num_tokens * num_heads, num_heads, **dims)
    return out


@torch.no_grad()
def sum_branches(cmp: Tensor, slc: Tensor, win: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`cmp + slc + win`, rounded once to the dtype of `cmp`: the three branches' gradients of q, [T, Hq, Dk].

    out         [T, Hq, Dk] of any strides over tokens and heads, filled and returned; None: a new tensor
    Raises ValueError on shapes and dtypes that do not fit.
    """
    tensors = _rows_of_one_shape("the branches", cmp, slc, win)
    if out is None:
        out = torch.empty(cmp.shape, dtype=cmp.dtype, device=cmp.device)
    check_out(out, tuple(cmp.shape), cmp.dtype)
    if out.numel():
        grid, dims = row_blocks(cmp)
        num_tokens, num_heads, _ = cmp.shape
        strides = token_head_strides(*tensors, out)
        _sum_kernel[grid](*tensors, out, *strides, num_tokens * num_heads, num_heads, **dims)
    return out


def _rows_of_one_shape(names: str, *tensors: Tensor) -> list[Tensor]:
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
