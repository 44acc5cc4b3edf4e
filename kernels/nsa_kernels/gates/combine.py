"""The gated sum of the three branches (NSA, eq. 5), and its gradients, each in one pass over its operands.

    out[t, h] = sum_b gates[t, h, b] * out_b[t, h]                     b in the order cmp, slc, win
    d out_b   = gates[t, h, b] * d out             d gates[t, h, b] = sum_d out_b[t, h, d] * d out[t, h, d]

Shapes      gates [T, Hq, 3]    out_cmp, out_slc, out_win, out [T, Hq, Dv]
Dtypes      out_* of one dtype of bf16, fp16 or fp32; gates of any of them. Computed in fp32, results rounded once.
Strides     any over tokens, heads and branches; out_* and d out are copied where their last stride is not 1. The result
            may be written into a view of a larger tensor, such as the heads of one group.
Bytes       forward reads 3 and writes 1 times T * Hq * Dv elements, backward reads 4 and writes 3: d out is read once.
Reference   nsa_kernels.reference.combine
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.rows import row_blocks, token_head_strides, unit_stride
from nsa_kernels.gates.rows import check_out


@triton.jit
def _gated(gate_ptr, x_ptr, inside, mask, dim):
    """A branch's gate [BLOCK_M] and rows [BLOCK_M, BLOCK_D], in fp32."""
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    return gate, tl.load(x_ptr[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)


@launchable
@triton.jit
def _forward_kernel(
    gates_ptr,
    cmp_ptr,
    slc_ptr,
    win_ptr,
    out_ptr,
    stride_gt,
    stride_gh,
    stride_gb,
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
    """`out` of BLOCK_M (token, head) rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // num_heads, row % num_heads
    dim = tl.arange(0, BLOCK_D)
    inside = row < num_rows
    mask = inside[:, None] & (dim < DIM)[None, :]
    gates = gates_ptr + token * stride_gt + head * stride_gh
    gate_cmp, out_cmp = _gated(gates, cmp_ptr + token * stride_ct + head * stride_ch, inside, mask, dim)
    gate_slc, out_slc = _gated(gates + stride_gb, slc_ptr + token * stride_st + head * stride_sh, inside, mask, dim)
    gate_win, out_win = _gated(gates + 2 * stride_gb, win_ptr + token * stride_wt + head * stride_wh, inside, mask, dim)
    out = gate_cmp[:, None] * out_cmp + gate_slc[:, None] * out_slc + gate_win[:, None] * out_win
    out_rows = out_ptr + token * stride_ot + head * stride_oh
    tl.store(out_rows[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_branch(gate, x, grad_out, grad_x_ptr, grad_gate_ptr, inside, mask):
    """Store one branch's `d out_b` and `d gate`."""
    tl.store(grad_x_ptr, (gate[:, None] * grad_out).to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_gate_ptr, tl.sum(x * grad_out, 1).to(grad_gate_ptr.dtype.element_ty), mask=inside)


@launchable
@triton.jit
def _backward_kernel(
    gates_ptr,
    cmp_ptr,
    slc_ptr,
    win_ptr,
    grad_out_ptr,
    grad_gates_ptr,
    grad_cmp_ptr,
    grad_slc_ptr,
    grad_win_ptr,
    stride_gt,
    stride_gh,
    stride_gb,
    stride_ct,
    stride_ch,
    stride_st,
    stride_sh,
    stride_wt,
    stride_wh,
    stride_dt,
    stride_dh,
    num_rows,
    num_heads,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Every gradient, contiguous, of BLOCK_M (token, head) rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // num_heads, row % num_heads
    dim = tl.arange(0, BLOCK_D)
    inside = row < num_rows
    mask = inside[:, None] & (dim < DIM)[None, :]
    grad_rows = grad_out_ptr + token * stride_dt + head * stride_dh
    grad_out = tl.load(grad_rows[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    gates = gates_ptr + token * stride_gt + head * stride_gh
    grad_gates = grad_gates_ptr + row * 3
    where = row[:, None] * DIM + dim[None, :]
    gate, x = _gated(gates, cmp_ptr + token * stride_ct + head * stride_ch, inside, mask, dim)
    _backward_branch(gate, x, grad_out, grad_cmp_ptr + where, grad_gates, inside, mask)
    gate, x = _gated(gates + stride_gb, slc_ptr + token * stride_st + head * stride_sh, inside, mask, dim)
    _backward_branch(gate, x, grad_out, grad_slc_ptr + where, grad_gates + 1, inside, mask)
    gate, x = _gated(gates + 2 * stride_gb, win_ptr + token * stride_wt + head * stride_wh, inside, mask, dim)
    _backward_branch(gate, x, grad_out, grad_win_ptr + where, grad_gates + 2, inside, mask)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, *branches):
        branches = tuple(unit_stride(t) for t in branches)
        ctx.save_for_backward(gates, *branches)
        out = torch.empty(branches[0].shape, dtype=branches[0].dtype, device=branches[0].device)
        _launch_forward(gates, branches, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        gates, *branches = ctx.saved_tensors
        grad_out = unit_stride(grad_out)
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gates, *branches)]
        if grad_out.numel():
            grid, dims = row_blocks(grad_out)
            strides = (*gates.stride(), *token_head_strides(*branches, grad_out))
            sizes = (grad_out.shape[0] * grad_out.shape[1], grad_out.shape[1])
            _backward_kernel[grid](gates, *branches, grad_out, *grads, *strides, *sizes, **dims)
        return tuple(grads)


def _launch_forward(gates: Tensor, branches: tuple[Tensor, ...], out: Tensor) -> None:
    """Fill `out`; the last stride of all but `gates` is 1."""
    if not out.numel():
        return
    grid, dims = row_blocks(out)
    strides = (*gates.stride(), *token_head_strides(*branches, out))
    _forward_kernel[grid](gates, *branches, out, *strides, out.shape[0] * out.shape[1], out.shape[1], **dims)


def combine(gates: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`sum_b gate_b * out_b` (eq. 5): gates [T, Hq, 3] in the order cmp, slc, win, out_* [T, Hq, Dv] of one dtype.

    out         [T, Hq, Dv] of any strides over tokens and heads, filled and returned, outside of autograd; None: a new
                tensor
    Raises ValueError on shapes and dtypes that do not fit.
    """
    branches = (out_cmp, out_slc, out_win)
    shapes, dtypes = [tuple(t.shape) for t in branches], [t.dtype for t in branches]
    if len(set(shapes)) > 1 or len(set(dtypes)) > 1 or gates.shape != (*out_cmp.shape[:2], 3):
        raise ValueError(
            f"gates {tuple(gates.shape)} and branches {shapes} of {dtypes} do not fit: gates must be [T, Hq, 3] and "
            f"the branches [T, Hq, Dv] of one dtype, because they are summed row by row; reshape or cast them"
        )
    for name, dtype in (("gates", gates.dtype), ("the branches", out_cmp.dtype)):
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"{name} of {dtype}: the kernel needs bf16, fp16 or fp32, because it computes in fp32; cast, or use "
                f"nsa_kernels.reference for fp64"
            )
    if out is None:
        return _Combine.apply(gates, *branches)
    check_out(out, tuple(out_cmp.shape), out_cmp.dtype)
    out = out.detach()
    _launch_forward(gates, tuple(unit_stride(t) for t in branches), out)
    return out
