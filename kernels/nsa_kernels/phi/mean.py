"""The mean of every block of rows, forward and backward: the parameter-free phi. Shapes: see `compress`."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.rows import unit_stride
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.phi.tiles import MEAN_ROWS


@launchable
@triton.jit
def _mean_kernel(
    x_ptr, block_rows_ptr,
    y_ptr,
    num_blocks, block_len, stride_xt, stride_xh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, D_PAD)[None, :]
    start = tl.load(block_rows_ptr + block, mask=block < num_blocks, other=0).to(tl.int64)[:, None]
    mask = (block < num_blocks)[:, None] & (dim < D)
    total = tl.zeros([BLOCK, D_PAD], tl.float32)
    for offset in tl.range(0, block_len):
        row = x_ptr + (start + offset) * stride_xt + head.to(tl.int64) * stride_xh
        total += tl.load(row + dim, mask=mask, other=0.0).to(tl.float32)
    y = y_ptr + (block.to(tl.int64) * tl.num_programs(1) + head)[:, None] * D
    tl.store(y + dim, (total / block_len).to(y_ptr.dtype.element_ty), mask=mask)


@launchable
@triton.jit
def _mean_backward_kernel(
    grad_y_ptr, order_ptr, first_ptr, last_ptr,
    grad_x_ptr,
    num_rows, block_len, stride_yt, stride_yh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r takes from blocks order[first[r]] .. order[last[r] - 1], those that cover it, in that order."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, D_PAD)[None, :]
    first = tl.load(first_ptr + row, mask=row < num_rows, other=0)
    last = tl.load(last_ptr + row, mask=row < num_rows, other=0)
    total = tl.zeros([BLOCK, D_PAD], tl.float32)
    for step in tl.range(0, tl.max(last - first)):
        covers = first + step < last
        block = tl.load(order_ptr + first + step, mask=covers, other=0).to(tl.int64)[:, None]
        grad_y = grad_y_ptr + block * stride_yt + head.to(tl.int64) * stride_yh
        total += tl.load(grad_y + dim, mask=covers[:, None] & (dim < D), other=0.0).to(tl.float32)
    grad_x = grad_x_ptr + (row.to(tl.int64) * tl.num_programs(1) + head)[:, None] * D
    mask = (row < num_rows)[:, None] & (dim < D)
    tl.store(grad_x + dim, (total / block_len).to(grad_x_ptr.dtype.element_ty), mask=mask)


class CompressMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block_rows, block_len):
        x = unit_stride(x)
        ctx.save_for_backward(block_rows)
        ctx.num_rows, ctx.block_len = x.shape[0], block_len
        num_heads, head_dim = x.shape[1:]
        num_blocks = block_rows.shape[0]
        y = x.new_empty(num_blocks, num_heads, head_dim)
        if y.numel():
            _mean_kernel[(cdiv(num_blocks, MEAN_ROWS), num_heads)](
                x, block_rows,
                y,
                num_blocks, block_len, *x.stride()[:2],
                D=head_dim, D_PAD=next_power_of_2(head_dim), BLOCK=MEAN_ROWS,
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (block_rows,) = ctx.saved_tensors
        grad_y = unit_stride(grad_y)
        num_heads, head_dim = grad_y.shape[1:]
        grad_x = grad_y.new_empty(ctx.num_rows, num_heads, head_dim)
        if grad_x.numel() == 0 or grad_y.numel() == 0:
            return grad_x.zero_(), None, None
        starts, order = torch.sort(block_rows)
        # Row r is covered by the blocks that start in (r - l, r].
        row = torch.arange(ctx.num_rows, dtype=starts.dtype, device=starts.device)
        first = torch.searchsorted(starts, row - ctx.block_len, right=True, out_int32=True)
        last = torch.searchsorted(starts, row, right=True, out_int32=True)
        _mean_backward_kernel[(cdiv(ctx.num_rows, MEAN_ROWS), num_heads)](
            grad_y, order, first, last,
            grad_x,
            ctx.num_rows, ctx.block_len, *grad_y.stride()[:2],
            D=head_dim, D_PAD=next_power_of_2(head_dim), BLOCK=MEAN_ROWS,
        )  # fmt: skip
        return grad_x, None, None
