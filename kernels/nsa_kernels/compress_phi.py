"""The products of the compression MLP, forward and backward, over blocks gathered from x where they lie.

    pre    = vec(x[block i]) @ w1 + pos_emb @ w1      hidden = gelu(pre)      y = hidden @ w2
    dpre   = (dy @ w2^T) * gelu'(pre)                 dw2 = hidden^T dy
    dw1    = vec(x[block i])^T dpre + pos_emb (x) sum_i dpre                  dpos_emb = w1 sum_i dpre
    dx[r]  = sum over blocks i that cover row r of dpre[i] @ w1[r - start_i]^T

So neither x + pos_emb nor its blocks are ever written out: the position embedding is one bias row per head.
The rows of x that share an offset o in their blocks are one product [blocks, F] @ [F, D]; a row belongs to the last
block that starts at or before it, and earlier blocks that cover it too are products with a later slice of w1. Where
starts are d apart, that is l / d products for each of d offsets.

Shapes      x [R, Hkv, D], y [M, Hkv, D]; pre [Hkv, M, F] fp32, hidden and dpre [Hkv, M, F] in the dtype of x
Numerics    fp32 accumulation, each result rounded once. The bits of a block's y do not depend on the other blocks.
Work        each of pre, dw1 and dx 2 * M * l * D * F FLOP a head, and reads x (or writes dx) about l / d times from L2
Reference   nsa_kernels.reference.compress_mlp
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _gelu_parts(x):
    """sigmoid(2 z) and z' of gelu(x) = x (1 + tanh(z)) / 2 = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    z = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    slope = 0.7978845608028654 * (1.0 + 3 * 0.044715 * x * x)
    return tl.sigmoid(2.0 * z), slope


@triton.jit
def _hidden_kernel(
    x_ptr, block_rows_ptr, w1_ptr, bias_ptr,
    pre_ptr, hidden_ptr,
    num_blocks, block_len, width, stride_xt, stride_xh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pre and hidden of BLOCK_M blocks and BLOCK_F hidden values of one head."""
    head = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.load(block_rows_ptr + tl.minimum(block, num_blocks - 1)).to(tl.int64)
    x_rows = x_ptr + head * stride_xh + start[:, None] * stride_xt
    w1_head = w1_ptr + head * block_len * D * width
    inside = (f < width)[None, :]
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for first in tl.range(0, block_len * D, BLOCK_K):
        x = tl.load(x_rows + first // D * tl.cast(stride_xt, tl.int64) + (first % D + k)[None, :])  # [BLOCK_M, BLOCK_K]
        w1 = tl.load(w1_head + (first + k)[:, None] * width + f[None, :], mask=inside, other=0.0)
        acc = tl.dot(x, w1, acc, input_precision=PRECISION)
    pre = acc + tl.load(bias_ptr + head * width + f, mask=f < width, other=0.0)[None, :]
    gate, _ = _gelu_parts(pre)
    place = (head * num_blocks + block)[:, None] * width + f[None, :]
    mask = (block < num_blocks)[:, None] & inside
    tl.store(pre_ptr + place, pre, mask=mask)
    tl.store(hidden_ptr + place, (pre * gate).to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _output_kernel(
    hidden_ptr, w2_ptr,
    y_ptr,
    num_blocks, width,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_M blocks and BLOCK_D dims of one head."""
    head = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    hidden_rows = hidden_ptr + (head * num_blocks + tl.minimum(block, num_blocks - 1))[:, None] * width
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, width, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        hidden = tl.load(hidden_rows + f[None, :], mask=(f < width)[None, :], other=0.0)
        w2 = tl.load(w2_ptr + (head * width + f)[:, None] * D + dim[None, :], mask=(f < width)[:, None], other=0.0)
        acc = tl.dot(hidden, w2, acc, input_precision=PRECISION)
    y = y_ptr + (block * tl.num_programs(2) + head)[:, None] * D + dim[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(block < num_blocks)[:, None])


@triton.jit
def _grad_pre_kernel(
    grad_y_ptr, w2_ptr, pre_ptr,
    grad_pre_ptr, partial_ptr,
    num_blocks, width, stride_yt, stride_yh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dpre of BLOCK_M blocks and BLOCK_F hidden values of one head, and its sum over those blocks before rounding."""
    head = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    grad_y_rows = grad_y_ptr + head * stride_yh + tl.minimum(block, num_blocks - 1).to(tl.int64)[:, None] * stride_yt
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)
        grad_y = tl.load(grad_y_rows + dim[None, :])
        w2 = tl.load(w2_ptr + (head * width + f)[None, :] * D + dim[:, None], mask=(f < width)[None, :], other=0.0)
        acc = tl.dot(grad_y, w2, acc, input_precision=PRECISION)
    place = (head * num_blocks + block)[:, None] * width + f[None, :]
    mask = (block < num_blocks)[:, None] & (f < width)[None, :]
    pre = tl.load(pre_ptr + place, mask=mask, other=0.0)
    gate, slope = _gelu_parts(pre)
    grad_pre = tl.where(mask, acc * (gate + pre * gate * (1.0 - gate) * 2.0 * slope), 0.0)
    tl.store(grad_pre_ptr + place, grad_pre.to(grad_pre_ptr.dtype.element_ty), mask=mask)
    partial = (tl.program_id(0) * tl.num_programs(2) + head) * width + f
    tl.store(partial_ptr + partial, tl.sum(grad_pre, 0), mask=f < width)


@triton.jit
def _grad_w1_kernel(
    x_ptr, block_rows_ptr, grad_pre_ptr, pos_emb_ptr, total_ptr,
    grad_w1_ptr,
    num_blocks, block_len, width, stride_xt, stride_xh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw1 of BLOCK_K inputs (one offset in the block, BLOCK_K dims) and BLOCK_F hidden values of one head."""
    head = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offset = tl.program_id(0) * BLOCK_K // D
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (f < width)[None, :]
    x_dims = x_ptr + head * stride_xh + offset.to(tl.int64) * stride_xt + (k % D)[:, None]
    acc = tl.zeros([BLOCK_K, BLOCK_F], tl.float32)
    for first in tl.range(0, num_blocks, BLOCK_M):
        block = first + tl.arange(0, BLOCK_M)
        start = tl.load(block_rows_ptr + tl.minimum(block, num_blocks - 1)).to(tl.int64)
        x = tl.load(x_dims + start[None, :] * stride_xt, mask=(block < num_blocks)[None, :], other=0.0)
        grad_pre = grad_pre_ptr + (head * num_blocks + block)[:, None] * width + f[None, :]
        grad_pre = tl.load(grad_pre, mask=(block < num_blocks)[:, None] & inside, other=0.0)
        acc = tl.dot(x, grad_pre, acc, input_precision=PRECISION)
    place = (head * block_len * D + k)[:, None]
    total = tl.load(total_ptr + head * width + f, mask=f < width, other=0.0)
    acc += tl.load(pos_emb_ptr + place).to(tl.float32) * total[None, :]
    tl.store(grad_w1_ptr + place * width + f[None, :], acc.to(grad_w1_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_x_kernel(
    grad_pre_ptr, w1_ptr, start_ptr, order_ptr,
    grad_x_ptr,
    num_blocks, block_len, width, num_heads,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of the rows start + offset that belong to BLOCK_M blocks, taken in the order of their starts."""
    offset = tl.program_id(1)
    head = (tl.program_id(2) % num_heads).to(tl.int64)
    dim = tl.program_id(2) // num_heads * BLOCK_D + tl.arange(0, BLOCK_D)
    rank = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + rank, mask=rank < num_blocks, other=0).to(tl.int32)
    following = tl.load(start_ptr + rank + 1, mask=rank + 1 < num_blocks, other=FAR).to(tl.int32)
    owned = (rank < num_blocks) & (start + offset < following)
    grad_pre_head = grad_pre_ptr + head * num_blocks * width
    w1_head = w1_ptr + head * block_len * D * width

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    source = rank  # the blocks that cover the row: its own, the one before, ...
    covering = owned
    while tl.max(covering.to(tl.int32)) > 0:
        gap = start - tl.load(start_ptr + source, mask=covering, other=0).to(tl.int32)
        covering = covering & (gap + offset < block_len)
        gap = tl.where(covering, gap, FAR)
        # One product for each distance between starts; nearly always there is one.
        nearest = tl.min(gap)
        while nearest < FAR:
            here = gap == nearest
            block = tl.load(order_ptr + source, mask=here, other=0).to(tl.int64)
            for first in tl.range(0, width, BLOCK_F):
                f = first + tl.arange(0, BLOCK_F)
                grad_pre = grad_pre_head + block[:, None] * width + f[None, :]
                grad_pre = tl.load(grad_pre, mask=here[:, None] & (f < width)[None, :], other=0.0)
                w1 = w1_head + ((offset + nearest) * D + dim)[None, :] * width + f[:, None]
                w1 = tl.load(w1, mask=(f < width)[:, None], other=0.0)
                acc = tl.dot(grad_pre, w1, acc, input_precision=PRECISION)
            gap = tl.where(here, FAR, gap)
            nearest = tl.min(gap)
        source -= 1
        covering = covering & (source >= 0)
    grad_x = grad_x_ptr + ((start + offset).to(tl.int64) * num_heads + head)[:, None] * D + dim[None, :]
    tl.store(grad_x, acc.to(grad_x_ptr.dtype.element_ty), mask=owned[:, None])


def _tile(dtype: torch.dtype) -> dict[str, int | str]:
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "PRECISION": "ieee", "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "PRECISION": "tf32", "num_warps": 4, "num_stages": 3}


def _power_of_2_part(number: int, most: int) -> int:
    """The largest power of two that divides `number`, at most `most`."""
    return min(number & -number, most)


def mlp_forward(
    x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, Hkv, D], pre fp32 [Hkv, M, F], hidden [Hkv, M, F]; the parameters contiguous, in the dtype of x."""
    num_heads, head_dim = x.shape[1:]
    num_blocks, width = block_rows.shape[0], w1.shape[2]
    bias = torch.bmm(pos_emb.float().flatten(1)[:, None], w1.float())[:, 0]  # [Hkv, F]
    pre = x.new_empty(num_heads, num_blocks, width, dtype=torch.float32)
    hidden = x.new_empty(num_heads, num_blocks, width)
    y = x.new_empty(num_blocks, num_heads, head_dim)
    if num_blocks == 0:
        return y, pre, hidden
    tile = _tile(x.dtype)
    block_d = _power_of_2_part(head_dim, 64)
    block_f = _width_tile(width)
    row_tiles = triton.cdiv(num_blocks, tile["BLOCK_M"])
    _hidden_kernel[(row_tiles, triton.cdiv(width, block_f), num_heads)](
        x, block_rows, w1, bias,
        pre, hidden,
        num_blocks, pos_emb.shape[1], width, *x.stride()[:2],
        D=head_dim, BLOCK_F=block_f, BLOCK_K=block_d, **tile,
    )  # fmt: skip
    _output_kernel[(row_tiles, head_dim // block_d, num_heads)](
        hidden, w2,
        y,
        num_blocks, width,
        D=head_dim, BLOCK_D=block_d, BLOCK_F=min(block_f, 64), **tile,
    )  # fmt: skip
    return y, pre, hidden


def mlp_backward(
    grad_y: Tensor, x: Tensor, block_rows: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor, pre: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, pos_emb, w1 and w2, in their dtypes."""
    num_heads, head_dim = x.shape[1:]
    block_len, num_blocks, width = pos_emb.shape[1], block_rows.shape[0], w1.shape[2]
    if num_blocks == 0:
        return torch.zeros_like(x), torch.zeros_like(pos_emb), torch.zeros_like(w1), torch.zeros_like(w2)
    tile = _tile(x.dtype)
    block_d = _power_of_2_part(head_dim, 64)
    block_f = _width_tile(width)
    row_tiles = triton.cdiv(num_blocks, tile["BLOCK_M"])
    grad_pre = torch.empty_like(hidden)
    partial = x.new_empty(row_tiles, num_heads, width, dtype=torch.float32)
    _grad_pre_kernel[(row_tiles, triton.cdiv(width, min(block_f, 64)), num_heads)](
        grad_y, w2, pre,
        grad_pre, partial,
        num_blocks, width, *grad_y.stride()[:2],
        D=head_dim, BLOCK_F=min(block_f, 64), BLOCK_D=block_d, **tile,
    )  # fmt: skip
    grad_w2 = torch.bmm(hidden.transpose(1, 2), grad_y.transpose(0, 1))
    total = partial.sum(0)  # [Hkv, F]
    grad_pos_emb = torch.bmm(w1.float(), total[..., None]).to(pos_emb.dtype).view_as(pos_emb)

    grad_w1 = torch.empty_like(w1)
    _grad_w1_kernel[(block_len * head_dim // block_d, triton.cdiv(width, block_f), num_heads)](
        x, block_rows, grad_pre, pos_emb, total,
        grad_w1,
        num_blocks, block_len, width, *x.stride()[:2],
        D=head_dim, BLOCK_F=block_f, BLOCK_K=block_d, **tile,
    )  # fmt: skip

    starts, order = torch.sort(block_rows)
    grad_x = x.new_zeros(x.shape)  # rows that no block covers stay 0
    _grad_x_kernel[(row_tiles, block_len, num_heads * head_dim // block_d)](
        grad_pre, w1, starts, order,
        grad_x,
        num_blocks, block_len, width, num_heads,
        D=head_dim, BLOCK_F=min(block_f, 64), BLOCK_D=block_d, **tile,
    )  # fmt: skip
    return grad_x, grad_pos_emb, grad_w1, grad_w2


def _width_tile(width: int) -> int:
    return max(16, min(128, triton.next_power_of_2(width)))
