"""The splits of each branch merged in ascending order, the gates, and the lengths of the sequences taken on.

    out_b = (sum_s 2 ** (m_s - M) * out_s) / (sum_s 2 ** (m_s - M) * sum_s)       M = max of the m_s of the branch
    out   = sum_b gate_b * out_b                                                  rounded once

A branch without keys is 0, and so is all of an empty slot.

Source      Milakov & Gimelshein 2018, arXiv:1805.02867, section 3.1
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.decode.append import num_whole
from nsa_kernels.decode.call import DecodeSizes, PagedCache
from nsa_kernels.decode.chosen import ChosenParts
from nsa_kernels.decode.compressed import CompressedParts
from nsa_kernels.decode.tiles import Split


@triton.jit
def _merged(max_ptr, sum_ptr, out_ptr, part, num_used, DV: tl.constexpr, PARTS: tl.constexpr):
    """out [DV] of the parts `part` .. `part + num_used`."""
    dim = tl.arange(0, DV)
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([DV], tl.float32)
    for first in tl.range(0, num_used, PARTS):
        index = first + tl.arange(0, PARTS)
        used = index < num_used
        part_max = tl.load(max_ptr + part + index, mask=used, other=float("-inf"))
        part_sum = tl.load(sum_ptr + part + index, mask=used, other=0.0)
        used = used & (part_max > float("-inf"))
        m_new = tl.maximum(m, tl.max(part_max, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(part_max - base)
        alpha = tl.exp2(m - base)
        outs = tl.load(out_ptr + (part + index)[:, None] * DV + dim[None, :], mask=used[:, None], other=0.0)
        acc = acc * alpha + tl.sum(outs * weight[:, None], 0)
        total = total * alpha + tl.sum(part_sum * weight, 0)
        m = m_new
    return acc / tl.where(total > 0, total, 1.0)


@launchable
@triton.jit
def _merge_kernel(
    cmp_max_ptr, cmp_sum_ptr, cmp_out_ptr, max_ptr, sum_ptr, out_parts_ptr, gates_ptr, slots_ptr, ends_ptr,
    out_ptr, lengths_ptr,
    new, num_q_heads, num_splits, num_parts, stride_gt, stride_gh, stride_gb,
    G: tl.constexpr, CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr,
    SLC_LEN: tl.constexpr, WINDOW: tl.constexpr, NUM_CHOSEN: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    SLC_PARTS: tl.constexpr, PART_BLOCKS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # (sequence * new + token) * Hq + head
    query = row // num_q_heads
    q_head = row % num_q_heads
    batch, token = query // new, query % new
    end = tl.load(ends_ptr + batch)
    dim = tl.arange(0, DV)
    out = tl.zeros([DV], tl.float32)
    if end > 0:
        num_cells = tl.where(end >= CMP_LEN, num_whole(end, CMP_LEN, CMP_STRIDE) + CELLS_CMP - 1, 0)
        num_used = tl.cdiv(tl.cdiv(num_cells, CELLS_SLC), SPLIT_PAGES)
        state = (batch * (num_q_heads // G) + q_head // G) * (new * G) + token * G + q_head % G
        gates = gates_ptr + query * stride_gt + q_head * stride_gh
        gate = tl.load(gates).to(tl.float32)
        out = gate * _merged(cmp_max_ptr, cmp_sum_ptr, cmp_out_ptr, state * num_splits, num_used, DV, 8)
        position = end - new + token.to(tl.int32)
        num_used = tl.cdiv(tl.minimum(position // SLC_LEN + 1, NUM_CHOSEN), PART_BLOCKS)
        gate = tl.load(gates + stride_gb).to(tl.float32)
        out += gate * _merged(max_ptr, sum_ptr, out_parts_ptr, row * num_parts, num_used, DV, 8)
        num_used = tl.cdiv(tl.cdiv(tl.minimum(position + 1, WINDOW), SLC_LEN), PART_BLOCKS)
        gate = tl.load(gates + 2 * stride_gb).to(tl.float32)
        out += gate * _merged(max_ptr, sum_ptr, out_parts_ptr, row * num_parts + SLC_PARTS, num_used, DV, 8)
        if (token == 0) & (q_head == 0):
            tl.store(lengths_ptr + tl.load(slots_ptr + batch), end)
    tl.store(out_ptr + row * DV + dim, out.to(out_ptr.dtype.element_ty))


def merge_parts(
    compressed: CompressedParts, chosen: ChosenParts, gates: Tensor, cache: PagedCache, slots: Tensor, ends: Tensor,
    out: Tensor, cut: Split, sizes: DecodeSizes,
) -> None:  # fmt: skip
    """Writes out [B, new, Hq, Dv], contiguous, and `cache.lengths`."""
    new, num_q_heads, dim_v = out.shape[1:]
    gates = gates.flatten(0, 1)
    _merge_kernel[(out.numel() // dim_v,)](
        *compressed[:3], *chosen[:3], gates, slots, ends,
        out, cache.lengths,
        new, num_q_heads, cut.num_splits, chosen.maximum.shape[3], *gates.stride(),
        G=num_q_heads // compressed.maximum.shape[1], CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride,
        CELLS_CMP=sizes.cells_cmp, CELLS_SLC=sizes.cells_slc, SLC_LEN=sizes.slc_block_len, WINDOW=sizes.window_len,
        NUM_CHOSEN=sizes.num_slc_blocks, SPLIT_PAGES=cut.split_pages,
        SLC_PARTS=chosen.slc_parts, PART_BLOCKS=chosen.part_blocks, DV=dim_v, num_warps=2,
    )  # fmt: skip
