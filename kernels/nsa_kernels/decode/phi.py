"""phi of the few blocks that have become whole with the new tokens, into their pages: an MLP, or the mean.

    pre[i, h] = vec(x[i, h]) @ w1[h] + vec(pos_emb[h]) @ w1[h]      cut into PARTS of the sum over l * D
    y[i, h]   = gelu(pre[i, h]) @ w2[h]                             gelu in its tanh form

and y is turned by the position of the block's first token, where it is compressed before RoPE.

Nearly all of the work is to read the weights, so the sum is spread over the card; of the programs of a head and tile of
blocks the one that comes last adds up the parts, in their order, and goes on. One launch; tiles without a block that
has become whole leave at once, which of steps with one new token are all but one in d.

Shapes      N = 2 * Hkv, heads of keys and then of values; M = B * F places, as `Appended`; parts fp32 [PARTS, N, M,
            width]. Keys and values may have other head dims and widths
Numerics    fp32 accumulation; hidden values enter the second product in the dtype of x; y is rounded to it, and once
            more when it has been turned, in fp32 by angles in fp64, as in training
Reference   nsa_kernels.reference.decode
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.overlap import overlapping, wait
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.common.tiles import dot_precision
from nsa_kernels.decode.append import in_page
from nsa_kernels.decode.turn import partner, turned, turns_of
from nsa_kernels.decode_contracts import Appended, PagedCache
from nsa_kernels.phi.compress import mlp_tensors
from nsa_kernels.phi.mlp import gelu_parts, power_of_2_part, whose

PARTS = 16  # of the few blocks of one tile; of more FEWER: 64 blocks 20 us instead of 29 on one H200
FEWER_PARTS = 8
BLOCK_M = 16


@launchable
@triton.jit
def _mlp_kernel(
    x_ptr, x2_ptr, cell_rows_ptr, start_ptr, pos_emb_ptr, pos_emb2_ptr, w1_ptr, w12_ptr, w2_ptr, w22_ptr, turn_ptr,
    turn2_ptr,
    parts_ptr, arrived_ptr, y_ptr, page_ptr, page2_ptr,
    num_blocks, block_len, num_heads, width, width2, half, half2, inverse, inverse2,
    PARTS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, D_MOST: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr, IS_TURNED: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Tensors and sizes that end in 2 are of values, the others of keys."""
    wait(OVERLAPS)
    part = tl.program_id(0)
    block = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    cell_row = tl.load(cell_rows_ptr + block, mask=block < num_blocks, other=-1)
    if tl.max(cell_row) < 0:
        return
    whole = (cell_row >= 0)[:, None]
    slot = tl.program_id(1).to(tl.int64)
    num_slots = tl.num_programs(1)
    head = slot % num_heads
    dims = tl.where(slot < num_heads, D, D2)
    inverse = tl.where(slot < num_heads, inverse, inverse2)
    most_width = tl.maximum(width, width2)
    width = tl.where(slot < num_heads, width, width2)
    x_ptr = whose(slot, num_heads, x_ptr, x2_ptr)
    pos_emb_ptr = whose(slot, num_heads, pos_emb_ptr, pos_emb2_ptr)
    w1_ptr = whose(slot, num_heads, w1_ptr, w12_ptr)
    x_rows = x_ptr + (block.to(tl.int64) * block_len * num_heads + head)[:, None] * dims
    k = tl.arange(0, BLOCK_D)
    part_len = tl.cdiv(block_len * dims, PARTS * BLOCK_D) * BLOCK_D
    start = part * part_len
    stop = tl.minimum(start + part_len, block_len * dims)
    for first_f in tl.range(0, width, BLOCK_F):
        f = first_f + tl.arange(0, BLOCK_F)
        inside = (f < width)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for first in tl.range(start, stop, BLOCK_D):
            dim = first % dims + k
            x = tl.load(x_rows + (first // dims * num_heads * dims + dim)[None, :], mask=whole, other=0.0)
            pos_emb = tl.load(pos_emb_ptr + head * block_len * dims + first + k)
            w1_rows = w1_ptr + (head * block_len * dims + first + k)[:, None] * width
            w1 = tl.load(w1_rows + f[None, :], mask=inside, other=0.0)
            acc = tl.dot(x, w1, acc, input_precision=PRECISION)
            # As a product of its own: x + pos_emb would be rounded.
            acc = tl.dot(tl.broadcast_to(pos_emb[None, :], [BLOCK_M, BLOCK_D]), w1, acc, input_precision=PRECISION)
        to = ((part * num_slots + slot) * num_blocks + block)[:, None] * most_width + f[None, :]
        tl.store(parts_ptr + to, acc, mask=whole & inside)

    tl.debug_barrier()  # all threads have stored before one of them says so
    counter = arrived_ptr + tl.program_id(2) * num_slots + slot
    if tl.atomic_add(counter, 1, sem="acq_rel") < PARTS - 1:
        return
    w2_ptr = whose(slot, num_heads, w2_ptr, w22_ptr)
    page_ptr = whose(slot, num_heads, page_ptr, page2_ptr)
    page_rows = page_ptr + (cell_row.to(tl.int64) * num_heads + head)[:, None] * dims
    y_rows = y_ptr + (slot * num_blocks + block)[:, None] * D_MOST
    every = tl.arange(0, D_PAD)
    stored = whole & (every < dims)[None, :]
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for first_f in tl.range(0, width, HIDDEN, num_stages=1):
        f = first_f + tl.arange(0, HIDDEN)
        inside = (f < width)[None, :]
        w2_rows = w2_ptr + (head * width + f)[:, None] * dims
        w2 = tl.load(w2_rows + every[None, :], mask=(f < width)[:, None] & (every < dims)[None, :], other=0.0)
        pre = tl.zeros([BLOCK_M, HIDDEN], tl.float32)
        for i in tl.static_range(PARTS):
            at = ((i * num_slots + slot) * num_blocks + block)[:, None] * most_width + f[None, :]
            pre += tl.load(parts_ptr + at, mask=whole & inside, other=0.0, cache_modifier=".cg")
        gate, _ = gelu_parts(pre)
        acc = tl.dot((pre * gate).to(w2.dtype), w2, acc, input_precision=PRECISION)
    y = acc.to(y_ptr.dtype.element_ty)
    if IS_TURNED:
        tl.store(y_rows + every[None, :], y, mask=stored)
    else:
        tl.store(page_rows + every[None, :], in_page(y, inverse, page_ptr), mask=stored)
    if IS_TURNED:
        tl.debug_barrier()  # a pair's numbers are of two threads
        turn_ptr = whose(slot, num_heads, turn_ptr, turn2_ptr)
        half = tl.where(slot < num_heads, half, half2)
        position = tl.load(start_ptr + block, mask=cell_row >= 0, other=0)
        for first in tl.range(0, dims, BLOCK_D):
            dim = first + tl.arange(0, BLOCK_D)
            own = tl.load(y_rows + dim[None, :], mask=whole, other=0.0)
            other = tl.load(y_rows + partner(dim, half)[None, :], mask=whole, other=0.0)
            found = turned(own, other, dim, position, turn_ptr, half)
            tl.store(page_rows + dim[None, :], in_page(found, inverse, page_ptr), mask=whole)


@launchable
@triton.jit
def _mean_kernel(
    x_ptr, x2_ptr, cell_rows_ptr, start_ptr, turn_ptr, turn2_ptr,
    page_ptr, page2_ptr,
    block_len, num_heads, half, half2, inverse, inverse2,
    D: tl.constexpr, D2: tl.constexpr, BLOCK_D: tl.constexpr, IS_TURNED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One block of one head, of keys and then of values."""
    wait(OVERLAPS)
    block = tl.program_id(0).to(tl.int64)
    cell_row = tl.load(cell_rows_ptr + block).to(tl.int64)
    if cell_row < 0:
        return
    slot = tl.program_id(1)
    head = slot % num_heads
    dims = tl.where(slot < num_heads, D, D2)
    inverse = tl.where(slot < num_heads, inverse, inverse2)
    x_ptr = whose(slot, num_heads, x_ptr, x2_ptr)
    page_ptr = whose(slot, num_heads, page_ptr, page2_ptr)
    half = tl.where(slot < num_heads, half, half2)
    dim = tl.arange(0, BLOCK_D)
    x_rows = x_ptr + (block * block_len * num_heads + head) * dims
    total = tl.zeros([BLOCK_D], tl.float32)
    other = tl.zeros([BLOCK_D], tl.float32)
    for offset in tl.range(0, block_len):
        row = x_rows + offset * num_heads * dims
        total += tl.load(row + dim, mask=dim < dims, other=0.0).to(tl.float32)
        if IS_TURNED:
            other += tl.load(row + partner(dim, half), mask=dim < dims, other=0.0).to(tl.float32)
    y = (total / block_len).to(x_ptr.dtype.element_ty)
    if IS_TURNED:
        turn_ptr = whose(slot, num_heads, turn_ptr, turn2_ptr)
        other = (other / block_len).to(x_ptr.dtype.element_ty)
        position = tl.load(start_ptr + block + tl.zeros([1], tl.int32))
        y = turned(y[None, :], other[None, :], dim, position, turn_ptr, half)
        y = tl.reshape(y, [BLOCK_D])
    to = page_ptr + (cell_row * num_heads + head) * dims + dim
    tl.store(to, in_page(y, inverse, page_ptr), mask=dim < dims)


@torch.no_grad()
def decode_compress_mlp(
    appended: Appended, cache: PagedCache, phi_k: tuple[Tensor, ...], phi_v: tuple[Tensor, ...],
    turn_k: Tensor | None = None, turn_v: Tensor | None = None,
) -> None:  # fmt: skip
    """`compress_mlp` of the blocks that have become whole, turned, into their pages.

    phi_k, phi_v    their (pos_emb [Hkv, l, D], w1 [Hkv, l * D, width], w2 [Hkv, width, D])
    turn_k, turn_v  fp64 [turned / 2 + 1]: the angle of each pair (y[i], y[i + turned / 2]) for one position, and a
                    factor of cosines and sines; None: it is not turned
    raises          ValueError on shapes and dtypes that `compress_mlp` does not take
    """
    xs = appended.k_raw, appended.v_raw
    assert appended.arrived is not None
    (_, *k), (_, *v) = (mlp_tensors(x, *phi) for x, phi in zip(xs, (phi_k, phi_v), strict=True))
    num_heads, dim_k = xs[0].shape[1:]
    dim_v, block_len = xs[1].shape[2], k[0].shape[1]
    num_blocks, widths = len(appended.cell_rows), (k[1].shape[2], v[1].shape[2])
    turns, halves = turns_of(turn_k, turn_v, appended.block_start)
    block_f = max(16, min(128, next_power_of_2(max(widths))))
    tiles = cdiv(num_blocks, BLOCK_M)
    num_parts = PARTS if tiles == 1 else FEWER_PARTS
    parts = xs[0].new_empty(num_parts, 2 * num_heads, num_blocks, max(widths), dtype=torch.float32)
    y = xs[0].new_empty(2 * num_heads, num_blocks, max(dim_k, dim_v))
    _mlp_kernel[(num_parts, 2 * num_heads, tiles)](
        *xs, appended.cell_rows, appended.block_start, k[0], v[0], k[1], v[1], k[2], v[2], *turns,
        parts, appended.arrived, y, cache.k_cmp, cache.v_cmp,
        num_blocks, block_len, num_heads, *widths, *halves, 1 / cache.k_scale, 1 / cache.v_scale,
        PARTS=num_parts, D=dim_k, D2=dim_v, D_MOST=max(dim_k, dim_v),
        D_PAD=next_power_of_2(max(dim_k, dim_v)), BLOCK_M=BLOCK_M,
        BLOCK_F=block_f, HIDDEN=min(block_f, 64), BLOCK_D=min(power_of_2_part(dim, 64) for dim in (dim_k, dim_v)),
        IS_TURNED=any(halves),
        PRECISION=dot_precision(xs[0].dtype), num_warps=4, **overlapping(xs[0]),
    )  # fmt: skip


@torch.no_grad()
def decode_compress_mean(
    appended: Appended, cache: PagedCache, turn_k: Tensor | None = None, turn_v: Tensor | None = None
) -> None:
    """The mean of the blocks that have become whole, turned as by `decode_compress_mlp`, into their pages."""
    num_heads, dim_k = appended.k_raw.shape[1:]
    dim_v, num_blocks = appended.v_raw.shape[2], len(appended.cell_rows)
    turns, halves = turns_of(turn_k, turn_v, appended.block_start)
    _mean_kernel[(num_blocks, 2 * num_heads)](
        appended.k_raw, appended.v_raw, appended.cell_rows, appended.block_start, *turns,
        cache.k_cmp, cache.v_cmp,
        len(appended.k_raw) // num_blocks, num_heads, *halves,
        1 / cache.k_scale, 1 / cache.v_scale,
        D=dim_k, D2=dim_v, BLOCK_D=next_power_of_2(max(dim_k, dim_v)), IS_TURNED=any(halves), num_warps=1,
        **overlapping(appended.k_raw),
    )  # fmt: skip
