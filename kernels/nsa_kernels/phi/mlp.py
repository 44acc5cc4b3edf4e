"""The products of the compression MLP, forward and backward, over blocks gathered from x where they lie.

    pre    = vec(x[block i]) @ w1 + pos_emb @ w1      hidden = gelu(pre)      y = hidden @ w2
    dpre   = (dy @ w2^T) * gelu'(pre)                 dw2 = hidden^T dy
    dw1    = vec(x[block i])^T dpre + pos_emb (x) sum_i dpre                  dpos_emb = w1 sum_i dpre
    dx[r]  = sum over blocks i that cover row r of dpre[i] @ w1[r - start_i]^T

So neither x + pos_emb nor its blocks are ever written out: the position embedding is one more row of the first
product, whose result is the bias of the others. The sum over l * D is cut into PARTS, added up in order, so that few
blocks fill a GPU too.
The rows of x that share an offset o in their blocks are one product [blocks, F] @ [F, D]; a row belongs to the last
block that starts at or before it, and earlier blocks that cover it too are products with a later slice of w1. Where
starts are d apart, that is l / d products for each of d offsets.

One tensor or two of the same sizes and strides (keys and values) go through the same launches: heads of the second
come after those of the first, so that few blocks fill a GPU twice as well. N is 1 or 2.

Shapes      N of x [R, Hkv, D], y [M, Hkv, D], pos_emb [Hkv, l, D], w1 [Hkv, l * D, F], w2 [Hkv, F, D];
            pre [N * Hkv, M, F] fp32, hidden and dpre [N * Hkv, M, F] in the dtype of x
Numerics    fp32 accumulation, each result rounded once. The bits of a block's y do not depend on the other blocks.
Work        each of pre, dw1 and dx 2 * M * l * D * F FLOP a head, and reads x (or writes dx) about l / d times from L2
Reference   nsa_kernels.reference.compress_mlp
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.device import backend
from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.phi.tiles import mlp_tile

FAR = tl.constexpr(2**31 - 1)

PARTS = 4  # of the sum over l * D; a constant, so that the bits of a block's y do not depend on how many there are


@triton.jit
def gelu_parts(x):
    """sigmoid(2 z) and z' of gelu(x) = x (1 + tanh(z)) / 2 = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    z = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    slope = 0.7978845608028654 * (1.0 + 3 * 0.044715 * x * x)
    return tl.sigmoid(2.0 * z), slope


@triton.jit
def whose(head, num_heads, first_ptr, second_ptr):
    """The tensor that the head, counted over both, belongs to."""
    return tl.where(head < num_heads, first_ptr, second_ptr)


@launchable
@triton.jit
def _first_product_kernel(
    x_ptr, x2_ptr, block_rows_ptr, pos_emb_ptr, pos_emb2_ptr, w1_ptr, w12_ptr,
    parts_ptr,
    num_blocks, block_len, width, num_heads, stride_xt, stride_xh,
    PARTS: tl.constexpr, D: tl.constexpr, TWO_LOADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of vec(block) @ w1 of BLOCK_M blocks and BLOCK_F hidden values of one head; block M is pos_emb."""
    part = tl.program_id(2) % PARTS
    slot = (tl.program_id(2) // PARTS).to(tl.int64)
    x_ptr = whose(slot, num_heads, x_ptr, x2_ptr)
    pos_emb_ptr = whose(slot, num_heads, pos_emb_ptr, pos_emb2_ptr)
    w1_ptr = whose(slot, num_heads, w1_ptr, w12_ptr)
    head = slot % num_heads
    block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.load(block_rows_ptr + tl.minimum(block, num_blocks - 1)).to(tl.int64)
    is_block = (block < num_blocks)[:, None]
    x_rows = (x_ptr + head * stride_xh + start * stride_xt)[:, None]
    pos_emb = pos_emb_ptr + head * block_len * D
    if not TWO_LOADS:  # AMD's compiler takes no tile of addresses in two tensors
        rows = tl.where(is_block, x_rows, pos_emb)
        stride = tl.where(is_block, tl.cast(stride_xt, tl.int64), D)
    w1_head = w1_ptr + head * block_len * D * width
    inside = (f < width)[None, :]
    k = tl.arange(0, BLOCK_K)
    part_len = tl.cdiv(block_len * D, PARTS * BLOCK_K) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for first in tl.range(part * part_len, tl.minimum((part + 1) * part_len, block_len * D), BLOCK_K):
        dim = tl.multiple_of(first % D, BLOCK_K) + k  # so that a thread loads 16 bytes at once, not 2
        if TWO_LOADS:
            x = tl.load(x_rows + first // D * tl.cast(stride_xt, tl.int64) + dim[None, :])
            x = tl.where(is_block, x, tl.load(pos_emb + first + k)[None, :])
        else:
            x = tl.load(rows + first // D * stride + dim[None, :])  # [BLOCK_M, BLOCK_K]
        w1 = tl.load(w1_head + (first + k)[:, None] * width + f[None, :], mask=inside, other=0.0)
        acc = tl.dot(x, w1, acc, input_precision=PRECISION)
    num_slots = tl.num_programs(2) // PARTS
    place = ((part * num_slots + slot) * (num_blocks + 1) + block)[:, None] * width + f[None, :]
    tl.store(parts_ptr + place, acc, mask=(block <= num_blocks)[:, None] & inside)


@launchable
@triton.jit
def _second_product_kernel(
    parts_ptr, w2_ptr, w22_ptr,
    pre_ptr, hidden_ptr, y_ptr,
    num_blocks, width, num_heads,
    PARTS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pre and hidden of BLOCK_M blocks of one head, from the parts, and BLOCK_D dims of y."""
    slot = tl.program_id(2).to(tl.int64)
    num_slots = tl.num_programs(2)
    w2_ptr = whose(slot, num_heads, w2_ptr, w22_ptr)
    head = slot % num_heads
    block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, width, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        mask = (block < num_blocks)[:, None] & (f < width)[None, :]
        pre = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        bias = tl.zeros([BLOCK_F], tl.float32)
        for part in tl.static_range(PARTS):
            parts = parts_ptr + (part * num_slots + slot) * (num_blocks + 1) * width + f
            pre += tl.load(parts[None, :] + block[:, None] * width, mask=mask, other=0.0)
            bias += tl.load(parts + num_blocks * width, mask=f < width, other=0.0)
        pre += bias[None, :]
        gate, _ = gelu_parts(pre)
        hidden = (pre * gate).to(hidden_ptr.dtype.element_ty)
        if tl.program_id(1) == 0:
            place = (slot * num_blocks + block)[:, None] * width + f[None, :]
            tl.store(pre_ptr + place, pre, mask=mask)
            tl.store(hidden_ptr + place, hidden, mask=mask)
        w2 = tl.load(w2_ptr + (head * width + f)[:, None] * D + dim[None, :], mask=(f < width)[:, None], other=0.0)
        acc = tl.dot(hidden, w2, acc, input_precision=PRECISION)
    y = y_ptr + ((slot // num_heads * num_blocks + block) * num_heads + head)[:, None] * D + dim[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(block < num_blocks)[:, None])


@launchable
@triton.jit
def _grad_pre_kernel(
    grad_y_ptr, grad_y2_ptr, w2_ptr, w22_ptr, pre_ptr,
    grad_pre_ptr, partial_ptr,
    num_blocks, width, num_heads, stride_yt, stride_yh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dpre of BLOCK_M blocks and BLOCK_F hidden values of one head, and its sum over those blocks before rounding."""
    slot = tl.program_id(2).to(tl.int64)
    grad_y_ptr = whose(slot, num_heads, grad_y_ptr, grad_y2_ptr)
    w2_ptr = whose(slot, num_heads, w2_ptr, w22_ptr)
    head = slot % num_heads
    block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    grad_y_rows = grad_y_ptr + head * stride_yh + tl.minimum(block, num_blocks - 1).to(tl.int64)[:, None] * stride_yt
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)
        grad_y = tl.load(grad_y_rows + dim[None, :])
        w2 = tl.load(w2_ptr + (head * width + f)[None, :] * D + dim[:, None], mask=(f < width)[None, :], other=0.0)
        acc = tl.dot(grad_y, w2, acc, input_precision=PRECISION)
    place = (slot * num_blocks + block)[:, None] * width + f[None, :]
    mask = (block < num_blocks)[:, None] & (f < width)[None, :]
    pre = tl.load(pre_ptr + place, mask=mask, other=0.0)
    gate, slope = gelu_parts(pre)
    grad_pre = tl.where(mask, acc * (gate + pre * gate * (1.0 - gate) * 2.0 * slope), 0.0)
    tl.store(grad_pre_ptr + place, grad_pre.to(grad_pre_ptr.dtype.element_ty), mask=mask)
    partial = (tl.program_id(0) * tl.num_programs(2) + slot) * width + f
    tl.store(partial_ptr + partial, tl.sum(grad_pre, 0), mask=f < width)


@launchable
@triton.jit
def _grad_w1_kernel(
    x_ptr, x2_ptr, block_rows_ptr, grad_pre_ptr, pos_emb_ptr, pos_emb2_ptr, partial_ptr, w1_ptr, w12_ptr,
    grad_w1_ptr, grad_pos_emb_ptr,
    num_blocks, num_partials, block_len, width, num_heads, stride_xt, stride_xh,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw1 of BLOCK_K inputs (one offset in the block, BLOCK_K dims) and BLOCK_F hidden values of one head.

    The programs of the first hidden values take dpos_emb of their inputs too.
    """
    slot = tl.program_id(2).to(tl.int64)
    num_slots = tl.num_programs(2)
    x_ptr = whose(slot, num_heads, x_ptr, x2_ptr)
    pos_emb_ptr = whose(slot, num_heads, pos_emb_ptr, pos_emb2_ptr)
    w1_ptr = whose(slot, num_heads, w1_ptr, w12_ptr)
    head = slot % num_heads
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offset = tl.program_id(0) * BLOCK_K // D
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (f < width)[None, :]
    dim = tl.multiple_of(tl.program_id(0) * BLOCK_K % D, BLOCK_K) + tl.arange(0, BLOCK_K)
    x_dims = x_ptr + head * stride_xh + offset.to(tl.int64) * stride_xt + dim[:, None]
    acc = tl.zeros([BLOCK_K, BLOCK_F], tl.float32)
    for first in tl.range(0, num_blocks, BLOCK_M):
        block = first + tl.arange(0, BLOCK_M)
        start = tl.load(block_rows_ptr + tl.minimum(block, num_blocks - 1)).to(tl.int64)
        x = tl.load(x_dims + start[None, :] * stride_xt, mask=(block < num_blocks)[None, :], other=0.0)
        grad_pre = grad_pre_ptr + (slot * num_blocks + block)[:, None] * width + f[None, :]
        grad_pre = tl.load(grad_pre, mask=(block < num_blocks)[:, None] & inside, other=0.0)
        acc = tl.dot(x, grad_pre, acc, input_precision=PRECISION)
    place = head * block_len * D + k  # in the tensors of the head; in the gradients, which hold both, grad_place
    grad_place = slot * block_len * D + k
    total = _total(partial_ptr, f, slot, num_slots, num_partials, width)
    acc += tl.load(pos_emb_ptr + place).to(tl.float32)[:, None] * total[None, :]
    tl.store(grad_w1_ptr + grad_place[:, None] * width + f[None, :], acc.to(grad_w1_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        grad_pos_emb = tl.zeros([BLOCK_K], tl.float32)
        for first in tl.range(0, width, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            total = _total(partial_ptr, f, slot, num_slots, num_partials, width)
            w1 = tl.load(w1_ptr + place[:, None] * width + f[None, :], mask=(f < width)[None, :], other=0.0)
            grad_pos_emb += tl.sum(w1.to(tl.float32) * total[None, :], 1)
        tl.store(grad_pos_emb_ptr + grad_place, grad_pos_emb.to(grad_pos_emb_ptr.dtype.element_ty))


@triton.jit
def _total(partial_ptr, f, slot, num_slots, num_partials, width):
    """The sum of dpre over all blocks, of the hidden values f of one head."""
    total = tl.zeros(f.shape, tl.float32)
    for first in tl.range(0, num_partials, 32):
        tile = first + tl.arange(0, 32)[:, None]
        partial = partial_ptr + (tile * num_slots + slot) * width + f[None, :]
        total += tl.sum(tl.load(partial, mask=(tile < num_partials) & (f < width)[None, :], other=0.0), 0)
    return total


@launchable
@triton.jit
def _sort_kernel(block_rows_ptr, start_ptr, order_ptr, num_blocks, BLOCK: tl.constexpr):
    """starts = sorted(block_rows), order the blocks they come from: a block's place is how many go before it."""
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(block_rows_ptr + block, mask=block < num_blocks, other=0).to(tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, num_blocks, BLOCK):
        other = first + tl.arange(0, BLOCK)
        other_start = tl.load(block_rows_ptr + other, mask=other < num_blocks, other=FAR).to(tl.int32)
        before = (other_start[None, :] == start[:, None]) & (other[None, :] < block[:, None])
        place += tl.sum(((other_start[None, :] < start[:, None]) | before).to(tl.int32), 1)
    tl.store(start_ptr + place, start, mask=block < num_blocks)
    tl.store(order_ptr + place, block, mask=block < num_blocks)


@launchable
@triton.jit
def _grad_x_kernel(
    grad_pre_ptr, w1_ptr, w12_ptr, start_ptr, order_ptr,
    grad_x_ptr,
    num_rows, num_blocks, block_len, width, num_heads, num_slots,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of the rows start + offset that belong to BLOCK_M blocks, taken in the order of their starts."""
    offset = tl.program_id(1)
    slot = (tl.program_id(2) % num_slots).to(tl.int64)
    w1_ptr = whose(slot, num_heads, w1_ptr, w12_ptr)
    head = slot % num_heads
    dim = tl.program_id(2) // num_slots * BLOCK_D + tl.arange(0, BLOCK_D)
    rank = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + rank, mask=rank < num_blocks, other=0).to(tl.int32)
    following = tl.load(start_ptr + rank + 1, mask=rank + 1 < num_blocks, other=FAR).to(tl.int32)
    owned = (rank < num_blocks) & (start + offset < following)
    grad_pre_head = grad_pre_ptr + slot * num_blocks * width
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
    grad_x = grad_x_ptr + ((slot // num_heads * num_rows + start + offset) * num_heads + head)[:, None] * D + dim
    tl.store(grad_x, acc.to(grad_x_ptr.dtype.element_ty), mask=owned[:, None])


def power_of_2_part(number: int, most: int) -> int:
    """The largest power of two that divides `number`, at most `most`."""
    return min(number & -number, most)


def mlp_forward(
    xs: Sequence[Tensor],
    block_rows: Tensor,
    pos_embs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, M, Hkv, D], pre and hidden [N * Hkv, M, F]; the parameters contiguous, in the dtype of x."""
    x, num_heads, head_dim = xs[0], *xs[0].shape[1:]
    num_slots = len(xs) * num_heads
    num_blocks, width = block_rows.shape[0], w1s[0].shape[2]
    pre = x.new_empty(num_slots, num_blocks, width, dtype=torch.float32)
    hidden = x.new_empty(num_slots, num_blocks, width)
    y = x.new_empty(len(xs), num_blocks, num_heads, head_dim)
    if num_blocks == 0:
        return y, pre, hidden
    tile = mlp_tile(x.dtype)
    block_d = power_of_2_part(head_dim, 64)
    block_f = _width_tile(width)
    parts = x.new_empty(PARTS, num_slots, num_blocks + 1, width, dtype=torch.float32)
    _first_product_kernel[(cdiv(num_blocks + 1, tile["BLOCK_M"]), cdiv(width, block_f), num_slots * PARTS)](
        *_both(xs), block_rows, *_both(pos_embs), *_both(w1s),
        parts,
        num_blocks, pos_embs[0].shape[1], width, num_heads, *x.stride()[:2],
        PARTS=PARTS, D=head_dim, TWO_LOADS=backend() != "cuda", BLOCK_F=block_f, BLOCK_K=block_d, **tile,
    )  # fmt: skip
    _second_product_kernel[(cdiv(num_blocks, tile["BLOCK_M"]), head_dim // block_d, num_slots)](
        parts, *_both(w2s),
        pre, hidden, y,
        num_blocks, width, num_heads,
        PARTS=PARTS, D=head_dim, BLOCK_D=block_d, BLOCK_F=min(block_f, 32), **{**tile, "num_stages": 1},
    )  # fmt: skip
    return y, pre, hidden


def mlp_backward(
    grad_ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    block_rows: Tensor,
    pos_embs: Sequence[Tensor],
    w1s: Sequence[Tensor],
    w2s: Sequence[Tensor],
    pre: Tensor,
    hidden: Tensor,
) -> tuple[list[Tensor], ...]:
    """The N gradients each of x, pos_emb, w1 and w2, in their dtypes; those of y have the same strides."""
    x, num_heads, head_dim = xs[0], *xs[0].shape[1:]
    num_slots, num_blocks, width = hidden.shape
    block_len = pos_embs[0].shape[1]
    if num_blocks == 0:
        return tuple([torch.zeros_like(t) for t in tensors] for tensors in (xs, pos_embs, w1s, w2s))
    tile = mlp_tile(x.dtype)
    block_d = power_of_2_part(head_dim, 64)
    block_f = _width_tile(width)
    row_tiles = cdiv(num_blocks, tile["BLOCK_M"])
    grad_pre = torch.empty_like(hidden)
    partial = x.new_empty(row_tiles, num_slots, width, dtype=torch.float32)
    _grad_pre_kernel[(row_tiles, cdiv(width, min(block_f, 64)), num_slots)](
        *_both(grad_ys), *_both(w2s), pre,
        grad_pre, partial,
        num_blocks, width, num_heads, *grad_ys[0].stride()[:2],
        D=head_dim, BLOCK_F=min(block_f, 64), BLOCK_D=block_d, **tile,
    )  # fmt: skip
    hiddens = hidden.transpose(1, 2).split(num_heads)
    with torch.autocast(x.device.type, enabled=False):  # which would make products of fp32 bf16
        grad_w2s = [torch.bmm(h, grad_y.transpose(0, 1)) for h, grad_y in zip(hiddens, grad_ys, strict=True)]
    grad_w1 = x.new_empty(len(xs), *w1s[0].shape)
    grad_pos_emb = x.new_empty(len(xs), *pos_embs[0].shape)
    _grad_w1_kernel[(block_len * head_dim // block_d, cdiv(width, block_f), num_slots)](
        *_both(xs), block_rows, grad_pre, *_both(pos_embs), partial, *_both(w1s),
        grad_w1, grad_pos_emb,
        num_blocks, row_tiles, block_len, width, num_heads, *x.stride()[:2],
        D=head_dim, BLOCK_F=block_f, BLOCK_K=block_d, **tile,
    )  # fmt: skip

    starts, order = block_rows.new_empty(2, num_blocks, dtype=torch.int32)
    _sort_kernel[(cdiv(num_blocks, 64),)](block_rows, starts, order, num_blocks, BLOCK=64)
    grad_x = x.new_zeros(len(xs), *x.shape)  # rows that no block covers stay 0
    _grad_x_kernel[(row_tiles, block_len, num_slots * head_dim // block_d)](
        grad_pre, *_both(w1s), starts, order,
        grad_x,
        x.shape[0], num_blocks, block_len, width, num_heads, num_slots,
        D=head_dim, BLOCK_F=min(block_f, 64), BLOCK_D=block_d, **tile,
    )  # fmt: skip
    return list(grad_x), list(grad_pos_emb), list(grad_w1), grad_w2s


def _both(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two tensors that kernels choose between; one alone stands for both."""
    return tensors[0], tensors[-1]


def _width_tile(width: int) -> int:
    return max(16, min(128, next_power_of_2(width)))
