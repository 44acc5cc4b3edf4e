"""What stands behind the branches' backwards, in one pass: the sum of their gradients of q.

    sum[t, h] = cmp[t, h] + slc[t, h] + win[t, h]

Shapes      cmp, slc, win, sum [T, Hq, D]
Dtypes      bf16, fp16 or fp32 each. Computed in fp32, rounded once, to the dtype of cmp.
Strides     any over tokens and heads; tensors are copied where their last stride is not 1.
Bytes       3 times T * Hq * D elements are read, once as many written.
Reference   nsa_kernels.reference.sum_branches
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.rows import row_blocks, token_head_strides
from nsa_kernels.gates.rows import check_out, load_rows, rows_of_one_shape


@launchable
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
    total = load_rows(cmp_ptr, token, head, stride_ct, stride_ch, mask, dim)
    total += load_rows(slc_ptr, token, head, stride_st, stride_sh, mask, dim)
    total += load_rows(win_ptr, token, head, stride_wt, stride_wh, mask, dim)
    out = out_ptr + token * stride_ot + head * stride_oh
    tl.store(out[:, None] + dim[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@torch.no_grad()
def sum_branches(cmp: Tensor, slc: Tensor, win: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`cmp + slc + win`, rounded once to the dtype of `cmp`: the three branches' gradients of q, [T, Hq, Dk].

    out         [T, Hq, Dk] of any strides over tokens and heads, filled and returned; None: a new tensor
    Raises ValueError on shapes and dtypes that do not fit.
    """
    tensors = rows_of_one_shape("the branches", cmp, slc, win)
    if out is None:
        out = torch.empty(cmp.shape, dtype=cmp.dtype, device=cmp.device)
    check_out(out, tuple(cmp.shape), cmp.dtype)
    if out.numel():
        grid, dims = row_blocks(cmp)
        num_tokens, num_heads, _ = cmp.shape
        strides = token_head_strides(*tensors, out)
        _sum_kernel[grid](*tensors, out, *strides, num_tokens * num_heads, num_heads, **dims)
    return out
