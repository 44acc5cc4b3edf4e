"""Splits merged within a part, parts merged with one another, the gates.

    lse = log2 sum_s 2 ** m_s * sum_s       out = sum_s 2 ** (m_s - lse) * out_s        of the splits of a branch
    out = sum_b gate_b * sum_p 2 ** (lse_p - lse) * out_p                               of the parts; rounded once

A branch without keys is (0, -inf). The window is whole in every part, so it is not merged.

What a part sends is `Merged.sent`, fp32 [branches * rows * (Dv + 1)], rows = B * new * Hq: out of cmp, out of slc, lse
of cmp, lse of slc; or out and lse of slc alone.

Source      Milakov & Gimelshein 2018, arXiv:1805.02867, section 3.1
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import next_power_of_2
from nsa_kernels.decode.online import with_parts
from nsa_kernels.decode.tiles import MERGE_WARPS
from nsa_kernels.decode_contracts import PagedCache
from nsa_kernels.decode_part.chosen import ChosenParts
from nsa_kernels.decode_part.compressed import PartScores


class Merged:
    """The branches of a part, [rows, Dv], and the lse of those that parts merge, in one piece of memory.

    sends       branches that parts merge: 2, and the window lies behind them, or 1, slc alone
    """

    def __init__(self, like: Tensor, rows: int, dim_v: int, sends: int) -> None:
        self.rows, self.dim_v = rows, dim_v
        held = sends * rows * (dim_v + 1)
        self.all = like.new_empty(held + (sends - 1) * rows * (dim_v + 1), dtype=torch.float32)
        self.sent = self.all[:held]
        self.lse_at = sends * rows * dim_v
        self.win_at = held

    @property
    def lse_cmp(self) -> Tensor:
        """fp32 [rows], in powers of 2."""
        return self.all[self.lse_at : self.lse_at + self.rows]


@launchable
@triton.jit
def _merge_splits_kernel(
    max_ptr, sum_ptr, out_parts_ptr,
    merged_ptr,
    new, num_q_heads, num_splits, out_at, lse_at, out_at2, lse_at2,
    G: tl.constexpr, GROUPED: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr,
    SPLITS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Program (row, 0) merges the splits FIRST .. SECOND, (row, 1) SECOND .. LAST."""
    row = tl.program_id(0).to(tl.int64)  # (sequence * new + token) * Hq + head
    is_second = tl.program_id(1) > 0
    dim = tl.arange(0, DV)
    state = row
    if GROUPED:
        query, q_head = row // num_q_heads, row % num_q_heads
        state = (query // new * (num_q_heads // G) + q_head // G) * (new * G) + query % new * G + q_head % G
    stop = tl.where(is_second, LAST, SECOND)
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([DV], tl.float32)
    for first in tl.range(tl.where(is_second, SECOND, FIRST), stop, SPLITS):
        split = first + tl.arange(0, SPLITS)
        part = state * num_splits + split
        part_max = tl.load(max_ptr + part, mask=split < stop, other=float("-inf"))
        used = part_max > float("-inf")
        part_sum = tl.load(sum_ptr + part, mask=used, other=0.0)
        outs = tl.load(out_parts_ptr + part[:, None] * DV + dim[None, :], mask=used[:, None], other=0.0)
        m, total, acc = with_parts(m, total, acc, part_max, part_sum, outs)
    acc /= tl.where(total > 0, total, 1.0)
    tl.store(merged_ptr + tl.where(is_second, out_at2, out_at) + row * DV + dim, acc)
    lse = tl.where(total > 0, m + tl.log2(total), float("-inf"))
    tl.store(merged_ptr + tl.where(is_second, lse_at2, lse_at) + row + tl.arange(0, 1), lse)


def merge_compressed(scores: PartScores, merged: Merged, new: int, num_q_heads: int) -> None:
    """The compressed branch into `merged`."""
    num_heads, num_splits = scores.maximum.shape[1], scores.maximum.shape[3]
    _merge_splits_kernel[(merged.rows, 1)](
        *scores[:3],
        merged.all,
        new, num_q_heads, num_splits, 0, merged.lse_at, 0, 0,
        G=num_q_heads // num_heads, GROUPED=True, FIRST=0, SECOND=num_splits, LAST=num_splits,
        SPLITS=min(8, next_power_of_2(num_splits)), DV=merged.dim_v, num_warps=MERGE_WARPS,
    )  # fmt: skip


def merge_chosen(chosen: ChosenParts, merged: Merged) -> None:
    """The selected branch and the window into `merged`."""
    programs, size = chosen.maximum.shape[3], merged.rows * merged.dim_v
    _merge_splits_kernel[(merged.rows, 2)](
        *chosen[:3],
        merged.all,
        1, 1, programs, size, merged.lse_at + merged.rows, merged.win_at, merged.win_at + size,
        G=1, GROUPED=False, FIRST=0, SECOND=chosen.slc_programs, LAST=programs,
        SPLITS=min(8, next_power_of_2(programs)), DV=merged.dim_v, num_warps=MERGE_WARPS,
    )  # fmt: skip


def merge_chosen_only(chosen: ChosenParts, merged: Merged) -> None:
    """The selected branch into `merged`, which has no other."""
    programs = chosen.slc_programs
    _merge_splits_kernel[(merged.rows, 1)](
        *chosen[:3],
        merged.all,
        1, 1, programs, 0, merged.lse_at, 0, 0,
        G=1, GROUPED=False, FIRST=0, SECOND=programs, LAST=programs,
        SPLITS=min(8, next_power_of_2(programs)), DV=merged.dim_v, num_warps=MERGE_WARPS,
    )  # fmt: skip


@launchable
@triton.jit
def _combine_kernel(
    sent_ptr, own_ptr, gates_ptr, slots_ptr, ends_ptr,
    out_ptr, lengths_ptr,
    new, num_q_heads, num_rows, v_scale, stride_p, stride_gt, stride_gh, stride_gb,
    SENT: tl.constexpr, NUM_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """own: the window's out; where one branch is sent, what the other two have given, under their gates."""
    row = tl.program_id(0).to(tl.int64)
    query, q_head = row // num_q_heads, row % num_q_heads
    batch = query // new
    end = tl.load(ends_ptr + batch)
    dim = tl.arange(0, DV)
    part = tl.arange(0, PARTS_PAD)
    gates = gates_ptr + query * stride_gt + q_head * stride_gh
    acc = tl.load(own_ptr + row * DV + dim)
    if SENT > 1:
        acc *= tl.load(gates + 2 * stride_gb).to(tl.float32)
    for branch in tl.static_range(SENT):
        lse_at = SENT * num_rows * DV + branch * num_rows + row
        lse = tl.load(sent_ptr + part * stride_p + lse_at, mask=part < NUM_PARTS, other=float("-inf"))
        at = part[:, None] * stride_p + (branch * num_rows + row) * DV + dim[None, :]
        outs = tl.load(sent_ptr + at, mask=(part < NUM_PARTS)[:, None], other=0.0)
        m = tl.max(lse, 0)
        weight = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
        total = tl.sum(weight, 0)
        gate = tl.load(gates + (branch + 2 - SENT) * stride_gb).to(tl.float32) * v_scale
        gate /= tl.where(total > 0, total, 1.0)
        acc += gate * tl.sum(outs * weight[:, None], 0)
    acc = tl.where(end > 0, acc, 0.0)
    tl.store(out_ptr + row * DV + dim, acc.to(out_ptr.dtype.element_ty))
    if (query % new == 0) & (q_head == 0) & (end > 0):
        tl.store(lengths_ptr + tl.load(slots_ptr + batch), end)


def combine_parts(
    gathered: Tensor, own: Tensor, gates: Tensor, cache: PagedCache, slots: Tensor, ends: Tensor, out: Tensor,
    sends: int,
) -> None:  # fmt: skip
    """Writes out [B, new, Hq, Dv], contiguous, and `cache.lengths`.

    gathered    [parts, sends * rows * (Dv + 1)]: every part's `Merged.sent`
    own         fp32 [rows, Dv]: the window's out, or with sends = 1 the sum of cmp's and win's under their gates
    """
    new, num_q_heads, dim_v = out.shape[1:]
    rows, gates = out.shape[:3].numel(), gates.flatten(0, 1)
    _combine_kernel[(rows,)](
        gathered, own, gates, slots, ends,
        out, cache.lengths,
        new, num_q_heads, rows, cache.v_scale, gathered.shape[1], *gates.stride(),
        SENT=sends, NUM_PARTS=len(gathered), PARTS_PAD=next_power_of_2(len(gathered)), DV=dim_v,
        num_warps=MERGE_WARPS,
    )  # fmt: skip
