"""phi as an MLP, of the few blocks that have become whole with the new tokens, into their pages.

    pre[i, h] = vec(x[i, h]) @ w1[h] + vec(pos_emb[h]) @ w1[h]      cut into PARTS of the sum over l * D
    y[i, h]   = gelu(pre[i, h]) @ w2[h]                             gelu in its tanh form

Nearly all of the work is to read the weights, so the first launch spreads them over the card. Tiles without a block
that has become whole leave at once, which of steps with one new token are all but one in d.

Shapes      N = 2 * Hkv, heads of keys and then of values; M = B * F places, as `Appended`; parts fp32 [PARTS, N, M, F]
Numerics    fp32 accumulation; hidden values enter the second product in the dtype of x; the result is rounded once
Reference   nsa_kernels.reference.decode
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.common.tiles import dot_precision
from nsa_kernels.decode.append import decode_store
from nsa_kernels.decode_contracts import Appended, PagedCache
from nsa_kernels.phi.compress import compress_mlp
from nsa_kernels.phi.mlp import gelu_parts, power_of_2_part, whose

PARTS = 16
BLOCK_M = 16


@launchable
@triton.jit
def _first_product_kernel(
    x_ptr, x2_ptr, cell_rows_ptr, pos_emb_ptr, pos_emb2_ptr, w1_ptr, w12_ptr,
    parts_ptr,
    num_blocks, block_len, width, num_heads,
    PARTS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    block = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    cell_row = tl.load(cell_rows_ptr + block, mask=block < num_blocks, other=-1)
    if tl.max(cell_row) < 0:
        return
    whole = (cell_row >= 0)[:, None]
    slot = tl.program_id(1).to(tl.int64)
    x_ptr = whose(slot, num_heads, x_ptr, x2_ptr)
    pos_emb_ptr = whose(slot, num_heads, pos_emb_ptr, pos_emb2_ptr)
    w1_ptr = whose(slot, num_heads, w1_ptr, w12_ptr)
    head = slot % num_heads
    x_rows = x_ptr + (block.to(tl.int64) * block_len * num_heads + head)[:, None] * D
    k = tl.arange(0, BLOCK_K)
    part_len = tl.cdiv(block_len * D, PARTS * BLOCK_K) * BLOCK_K
    start = part * part_len
    stop = tl.minimum(start + part_len, block_len * D)
    for first_f in tl.range(0, width, BLOCK_F):
        f = first_f + tl.arange(0, BLOCK_F)
        inside = (f < width)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for first in tl.range(start, stop, BLOCK_K):
            dim = first % D + k
            x = tl.load(x_rows + (first // D * num_heads * D + dim)[None, :], mask=whole, other=0.0)
            pos_emb = tl.load(pos_emb_ptr + head * block_len * D + first + k)
            w1 = tl.load(
                w1_ptr + (head * block_len * D + first + k)[:, None] * width + f[None, :], mask=inside, other=0.0
            )
            acc = tl.dot(x, w1, acc, input_precision=PRECISION)
            # As a product of its own: x + pos_emb would be rounded.
            acc = tl.dot(tl.broadcast_to(pos_emb[None, :], [BLOCK_M, BLOCK_K]), w1, acc, input_precision=PRECISION)
        to = ((part * tl.num_programs(1) + slot) * num_blocks + block)[:, None] * width + f[None, :]
        tl.store(parts_ptr + to, acc, mask=whole & inside)


@launchable
@triton.jit
def _second_product_kernel(
    parts_ptr, cell_rows_ptr, w2_ptr, w22_ptr,
    page_ptr, page2_ptr,
    num_blocks, width, num_heads,
    PARTS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    cell_row = tl.load(cell_rows_ptr + block, mask=block < num_blocks, other=-1)
    if tl.max(cell_row) < 0:
        return
    whole = (cell_row >= 0)[:, None]
    slot = tl.program_id(1).to(tl.int64)
    w2_ptr = whose(slot, num_heads, w2_ptr, w22_ptr)
    page_ptr = whose(slot, num_heads, page_ptr, page2_ptr)
    head = slot % num_heads
    dim = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_f in tl.range(0, width, BLOCK_F):
        f = first_f + tl.arange(0, BLOCK_F)
        inside = (f < width)[None, :]
        pre = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for part in tl.static_range(PARTS):
            at = ((part * tl.num_programs(1) + slot) * num_blocks + block)[:, None] * width + f[None, :]
            pre += tl.load(parts_ptr + at, mask=whole & inside, other=0.0)
        gate, _ = gelu_parts(pre)
        w2 = tl.load(w2_ptr + (head * width + f)[:, None] * D + dim[None, :], mask=(f < width)[:, None], other=0.0)
        acc = tl.dot((pre * gate).to(w2.dtype), w2, acc, input_precision=PRECISION)
    to = (cell_row.to(tl.int64) * num_heads + head)[:, None] * D + dim[None, :]
    tl.store(page_ptr + to, acc.to(page_ptr.dtype.element_ty), mask=whole)


@torch.no_grad()
def decode_compress_mlp(
    appended: Appended, cache: PagedCache, phi_k: tuple[Tensor, ...], phi_v: tuple[Tensor, ...]
) -> None:
    """`compress_mlp` of the blocks that have become whole, and `decode_store` of what it makes of them.

    phi_k, phi_v    their (pos_emb [Hkv, l, D], w1 [Hkv, l * D, F], w2 [Hkv, F, D])
    raises          ValueError on shapes and dtypes that `compress_mlp` does not take
    """
    xs = appended.k_raw, appended.v_raw
    weights = [[w.to(x.dtype).contiguous() for w in phi] for x, phi in zip(xs, (phi_k, phi_v), strict=True)]
    fits = all(
        x.shape[2] % 16 == 0 and w2.shape == (x.shape[1], w1.shape[2], x.shape[2])
        and pos_emb.shape[::2] == (x.shape[1], x.shape[2]) and w1.shape[1] == pos_emb[0].numel()
        for x, (pos_emb, w1, w2) in zip(xs, weights, strict=True)
    )  # fmt: skip
    if not fits or [w.shape for w in weights[0]] != [w.shape for w in weights[1]]:
        k, v = (compress_mlp(x, appended.block_rows, *phi) for x, phi in zip(xs, (phi_k, phi_v), strict=True))
        decode_store(k, v, appended, cache)
        return
    (pos_emb, w1, w2), (pos_emb2, w12, w22) = weights
    num_heads, block_len, dim = pos_emb.shape
    num_blocks, width = len(appended.cell_rows), w1.shape[2]
    parts = w1.new_empty(PARTS, 2 * num_heads, num_blocks, width, dtype=torch.float32)
    tiles = cdiv(num_blocks, BLOCK_M)
    block_f = max(16, min(128, next_power_of_2(width)))
    block_d = power_of_2_part(dim, 64)
    precision = dot_precision(w1.dtype)
    _first_product_kernel[(PARTS, 2 * num_heads, tiles)](
        *xs, appended.cell_rows, pos_emb, pos_emb2, w1, w12,
        parts,
        num_blocks, block_len, width, num_heads,
        PARTS=PARTS, D=dim, BLOCK_M=BLOCK_M, BLOCK_F=block_f, BLOCK_K=block_d, PRECISION=precision, num_warps=4,
    )  # fmt: skip
    _second_product_kernel[(dim // block_d, 2 * num_heads, tiles)](
        parts, appended.cell_rows, w2, w22,
        cache.k_cmp, cache.v_cmp,
        num_blocks, width, num_heads,
        PARTS=PARTS, D=dim, BLOCK_M=BLOCK_M, BLOCK_F=min(block_f, 64), BLOCK_D=block_d, PRECISION=precision,
        num_warps=4, num_stages=1,
    )  # fmt: skip
