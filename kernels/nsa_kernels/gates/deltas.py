"""What the branches' backwards need before them, in one pass: the deltas of all three.

    deltas[t, h, b] = sum_d d out[t, h, d] * out_b[t, h, d]         b in the order cmp, slc, win

Where `out` is the gated sum of `combine`, deltas are the gradient of the gates, and a column of them the `delta` of
that branch's backward: d out is read once for all, and no gate * d out is ever written.

Shapes      d out, out_* [T, Hq, Dv]    deltas [T, Hq, 3]
Dtypes      bf16, fp16 or fp32 each. Computed in fp32; deltas are fp32.
Strides     any over tokens and heads; tensors are copied where their last stride is not 1. New deltas are stored
            [3, T, Hq], so that the column of a branch is contiguous.
Bytes       4 times T * Hq * Dv elements are read.
Reference   nsa_kernels.reference.gate_deltas
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
    grad_out = load_rows(grad_out_ptr, token, head, stride_dt, stride_dh, mask, dim)
    out_cmp = load_rows(cmp_ptr, token, head, stride_ct, stride_ch, mask, dim)
    out_slc = load_rows(slc_ptr, token, head, stride_st, stride_sh, mask, dim)
    out_win = load_rows(win_ptr, token, head, stride_wt, stride_wh, mask, dim)
    deltas = deltas_ptr + token * stride_ot + head * stride_oh
    tl.store(deltas, tl.sum(grad_out * out_cmp, 1), mask=inside)
    tl.store(deltas + stride_ob, tl.sum(grad_out * out_slc, 1), mask=inside)
    tl.store(deltas + 2 * stride_ob, tl.sum(grad_out * out_win, 1), mask=inside)


@torch.no_grad()
def gate_deltas(
    grad_out: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """`deltas[t, h, b] = rowsum(grad_out * out_b)`, fp32 [T, Hq, 3], of grad_out and out_* [T, Hq, Dv].

    out         fp32 [T, Hq, 3] of any strides, filled and returned; None: a new tensor
    Raises ValueError on shapes and dtypes that do not fit.
    """
    tensors = rows_of_one_shape("grad_out and the branches", grad_out, out_cmp, out_slc, out_win)
    num_tokens, num_heads, _ = grad_out.shape
    if out is None:
        out = grad_out.new_empty(3, num_tokens, num_heads, dtype=torch.float32).permute(1, 2, 0)
    check_out(out, (num_tokens, num_heads, 3), torch.float32, dense_rows=False)
    if out.numel():
        grid, dims = row_blocks(grad_out)
        strides = (*token_head_strides(*tensors), *out.stride())
        _deltas_kernel[grid](*tensors, out, *strides, num_tokens * num_heads, num_heads, **dims)
    return out
