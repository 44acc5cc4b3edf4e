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
from nsa_kernels.common.sizes import next_power_of_2
from nsa_kernels.decode.append import num_whole
from nsa_kernels.decode.chosen import ChosenParts
from nsa_kernels.decode.compressed import CompressedParts
from nsa_kernels.decode.tiles import MERGE_WARPS, Split
from nsa_kernels.decode_contracts import DecodeSizes, PagedCache


@launchable
@triton.jit
def _merge_kernel(
    cmp_max_ptr, cmp_sum_ptr, cmp_out_ptr, max_ptr, sum_ptr, out_parts_ptr, gates_ptr, slots_ptr, ends_ptr,
    out_ptr, lengths_ptr,
    new, num_q_heads, num_parts, stride_gt, stride_gh, stride_gb,
    G: tl.constexpr, CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr,
    SLC_LEN: tl.constexpr, WINDOW: tl.constexpr, NUM_CHOSEN: tl.constexpr,
    NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    SLC_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, PART_BLOCKS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """A row of the output. Without branches and loops of unknown length, so that all loads are under way at once."""
    row = tl.program_id(0).to(tl.int64)  # (sequence * new + token) * Hq + head
    query = row // num_q_heads
    q_head = row % num_q_heads
    batch, token = query // new, query % new
    end = tl.load(ends_ptr + batch)
    dim = tl.arange(0, DV)[None, :]
    gates = gates_ptr + query * stride_gt + q_head * stride_gh
    gate_cmp = tl.load(gates).to(tl.float32)
    gate_slc = tl.load(gates + stride_gb).to(tl.float32)
    gate_win = tl.load(gates + 2 * stride_gb).to(tl.float32)

    num_cells = tl.where(end >= CMP_LEN, num_whole(end, CMP_LEN, CMP_STRIDE) + CELLS_CMP - 1, 0)
    num_used = tl.cdiv(tl.cdiv(num_cells, CELLS_SLC), SPLIT_PAGES)
    state = (batch * (num_q_heads // G) + q_head // G) * (new * G) + token * G + q_head % G
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([DV], tl.float32)
    for first in tl.static_range(0, NUM_SPLITS, SPLITS):
        split = first + tl.arange(0, SPLITS)
        part = state * NUM_SPLITS + split
        used = split < num_used
        part_max = tl.load(cmp_max_ptr + part, mask=used, other=float("-inf"))
        part_sum = tl.load(cmp_sum_ptr + part, mask=used, other=0.0)
        outs = tl.load(cmp_out_ptr + part[:, None] * DV + dim, mask=used[:, None], other=0.0)
        m_new = tl.maximum(m, tl.max(part_max, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(part_max - base)
        alpha = tl.exp2(m - base)
        acc = acc * alpha + tl.sum(outs * weight[:, None], 0)
        total = total * alpha + tl.sum(part_sum * weight, 0)
        m = m_new
    acc *= gate_cmp / tl.where(total > 0, total, 1.0)

    position = end - new + token.to(tl.int32)
    slc_used = tl.cdiv(tl.minimum(position // SLC_LEN + 1, NUM_CHOSEN), PART_BLOCKS)
    win_used = tl.cdiv(tl.cdiv(tl.minimum(position + 1, WINDOW), SLC_LEN), PART_BLOCKS)
    index = tl.arange(0, PARTS_PAD)
    is_slc = index < SLC_PARTS
    used = (end > 0) & tl.where(is_slc, index < slc_used, index - SLC_PARTS < win_used)
    part = row * num_parts + index
    part_max = tl.load(max_ptr + part, mask=used, other=float("-inf"))
    part_sum = tl.load(sum_ptr + part, mask=used, other=0.0)
    outs = tl.load(out_parts_ptr + part[:, None] * DV + dim, mask=used[:, None], other=0.0)
    slc_max = tl.max(tl.where(is_slc, part_max, float("-inf")), 0)
    win_max = tl.max(tl.where(is_slc, float("-inf"), part_max), 0)
    weight = tl.where(used, tl.exp2(part_max - tl.where(is_slc, slc_max, win_max)), 0.0)
    slc_total = tl.sum(tl.where(is_slc, weight * part_sum, 0.0), 0)
    win_total = tl.sum(tl.where(is_slc, 0.0, weight * part_sum), 0)
    weight *= tl.where(
        is_slc, gate_slc / tl.where(slc_total > 0, slc_total, 1.0), gate_win / tl.where(win_total > 0, win_total, 1.0)
    )
    acc += tl.sum(outs * weight[:, None], 0)
    tl.store(out_ptr + row * DV + tl.arange(0, DV), acc.to(out_ptr.dtype.element_ty))
    if (token == 0) & (q_head == 0) & (end > 0):
        tl.store(lengths_ptr + tl.load(slots_ptr + batch), end)


def merge_parts(
    compressed: CompressedParts, chosen: ChosenParts, gates: Tensor, cache: PagedCache, slots: Tensor, ends: Tensor,
    out: Tensor, cut: Split, sizes: DecodeSizes,
) -> None:  # fmt: skip
    """Writes out [B, new, Hq, Dv], contiguous, and `cache.lengths`."""
    new, num_q_heads, dim_v = out.shape[1:]
    gates, num_parts = gates.flatten(0, 1), chosen.maximum.shape[3]
    _merge_kernel[(out.numel() // dim_v,)](
        *compressed[:3], *chosen[:3], gates, slots, ends,
        out, cache.lengths,
        new, num_q_heads, num_parts, *gates.stride(),
        G=num_q_heads // compressed.maximum.shape[1], CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride,
        CELLS_CMP=sizes.cells_cmp, CELLS_SLC=sizes.cells_slc, SLC_LEN=sizes.slc_block_len, WINDOW=sizes.window_len,
        NUM_CHOSEN=sizes.num_slc_blocks,
        NUM_SPLITS=cut.num_splits, SPLITS=min(8, next_power_of_2(cut.num_splits)), SPLIT_PAGES=cut.split_pages,
        SLC_PARTS=chosen.slc_parts, PARTS_PAD=next_power_of_2(num_parts), PART_BLOCKS=chosen.part_blocks, DV=dim_v,
        num_warps=MERGE_WARPS,
    )  # fmt: skip
