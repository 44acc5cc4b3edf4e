"""The rest of the forward of selected attention: shared blocks, every part's weight, and the sum of parts.

`shared`, one tile of consecutive queries at a time: each row's first block, its own and the one before, which
neighbours have in common, make one part, in slot 0; and the log-sum-exps of all parts become their weights. Then
`parts.sum_parts`. Shapes: see `forward`; `hopper.forward_shared` does the same faster where it can.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2, split_head_dim
from nsa_kernels.selected.index import is_gathered
from nsa_kernels.selected.pages import load_page, page_strides
from nsa_kernels.selected.parts import SMALLEST, sum_parts
from nsa_kernels.selected.tiles import forward_tiles

NO_BLOCK = tl.constexpr(2**30)
LN2 = tl.constexpr(0.6931471805599453)


@launchable
@triton.jit(do_not_specialize=["num_queries", "head_start", "num_local_pages"])
def _shared_kernel(
    q, k, v, k_remote, v_remote, block_table, block_indices, position,
    part, scale, part_lse, lse,
    scale_log2, num_queries, head_start, num_local_pages, stride_table,
    stride_bt, stride_bh, stride_bn, stride_qt, stride_qh, stride_lt,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: tl.constexpr, SLOTS_P2: tl.constexpr, GROUP: tl.constexpr,
    DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr,
    BLOCK_LEN: tl.constexpr, HAS_REMOTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of consecutive queries: the blocks they share, as one part in slot 0; then the weights of all parts."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row = tl.arange(0, BLOCK_M)
    t = tl.program_id(0) * QUERIES + row // GROUP
    head = tl.program_id(1)
    kv_head = head_start + head
    live = (t < num_queries) & (row < QUERIES * GROUP)
    t = tl.where(live, t, 0).to(tl.int64)
    q_head = kv_head * GROUP + row % GROUP

    # A row's candidates, NO_BLOCK for those it did not choose: its first block, the one before its own, and its own.
    pos = tl.load(position + t, mask=live, other=-1).to(tl.int32)
    own = tl.where(pos >= 0, pos // BLOCK_LEN, -1)
    slot = tl.arange(0, SLOTS_P2)[None, :]
    ids_row = block_indices + t * stride_bt + kv_head * stride_bh
    there = live[:, None] & (slot < SLOTS)
    ids = tl.load(ids_row[:, None] + slot * stride_bn, mask=there, other=-1)
    first = tl.load(ids_row, mask=live, other=-1)
    first = tl.where((first >= 0) & (first <= own), first, NO_BLOCK)
    before = tl.max((ids == own[:, None] - 1).to(tl.int32), 1) > 0
    before = tl.where(before & (own > 0), own - 1, NO_BLOCK)
    last = tl.max((ids == own[:, None]).to(tl.int32), 1) > 0
    last = tl.where(last & (own >= 0), own, NO_BLOCK)

    # --- blocks attended to in place, ascending; a block that a row did not choose changes nothing in it
    q_row = q + t * stride_qt + q_head * stride_qh
    q0 = tl.load(q_row[:, None] + tl.arange(0, DK0))
    if DK1 > 0:
        q1 = tl.load(q_row[:, None] + DK0 + tl.arange(0, DK1))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    block = tl.min(tl.minimum(tl.minimum(first, before), last))
    while block < NO_BLOCK:
        page = tl.load(block_table + kv_head * stride_table + block)
        k0 = load_page(
            k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
            0, DK0, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
        value = load_page(
            v, v_remote, page, kv_head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
            0, DV, BLOCK_LEN, HAS_REMOTE,
        )  # fmt: skip
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if DK1 > 0:
            k1 = load_page(
                k, k_remote, page, kv_head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
                DK0, DK1, BLOCK_LEN, HAS_REMOTE,
            )  # fmt: skip
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        # The last key that each row sees here; -1 where the row did not choose the block.
        chosen = (first == block) | (before == block) | (last == block)
        last_key = tl.where(chosen, pos - block * BLOCK_LEN, -1)
        seen = tl.arange(0, BLOCK_LEN)[None, :] <= last_key[:, None]
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * keep[:, None], input_precision=PRECISION)
        top = new_top
        first = tl.where(first == block, NO_BLOCK, first)
        before = tl.where(before == block, NO_BLOCK, before)
        last = tl.where(last == block, NO_BLOCK, last)
        block = tl.min(tl.minimum(tl.minimum(first, before), last))

    # --- slot 0: a row's first block is among these, so a row without them sees nothing
    part_row = (head.to(tl.int64) * num_queries + t) * SLOTS * GROUP + row % GROUP
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    largest = tl.maximum(tl.max(tl.abs(acc), 1), SMALLEST)
    acc = acc * (1 / largest)[:, None]
    tl.store(part + part_row[:, None] * DV + tl.arange(0, DV), acc.to(part.dtype.element_ty), mask=live[:, None])
    shared_lse = tl.where(sees, top + tl.log2(total), float("-inf"))

    # --- every part's weight
    at = part_row[:, None] + slot * GROUP
    gathered = there & is_gathered(ids, slot, own[:, None], False)
    lses = tl.load(part_lse + at, mask=gathered, other=float("-inf"))
    lses = tl.where(slot == 0, shared_lse[:, None], lses)
    scales = tl.load(scale + at, mask=gathered, other=0.0)
    scales = tl.where(slot == 0, (largest / total)[:, None], scales)
    base = tl.max(lses, 1)
    base = tl.where(base == float("-inf"), 0.0, base)
    whole = tl.sum(tl.exp2(lses - base[:, None]), 1)
    result = base + tl.log2(tl.where(whole > 0, whole, 1.0))
    tl.store(scale + at, scales * tl.exp2(lses - result[:, None]), mask=there)
    tl.store(lse + t * stride_lt + q_head, tl.where(whole > 0, result * LN2, float("-inf")), mask=live)


def attend_shared_and_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    block_table: Tensor,
    block_indices: Tensor,
    position: Tensor,
    part: Tensor,
    scale: Tensor,
    part_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    head_start: int,
    slc_block_len: int,
    scale_log2: float,
) -> None:
    """Fill out and lse for the chunk, given the parts of its gathered entries."""
    num_heads, num_queries, num_slots, group, head_dim_v = part.shape
    tiles = forward_tiles(group, q.shape[2], head_dim_v)
    # Not more queries than a block has tokens: a tile then holds one document, and NaN in it reaches no other.
    shared_rows = max(16, min(tiles.shared_rows, next_power_of_2(group) * slc_block_len))
    dk0, dk1 = split_head_dim(q.shape[2])
    _shared_kernel[(cdiv(num_queries, shared_rows // group), num_heads)](
        q, k, v, k_remote, v_remote, block_table, block_indices, position,
        part, scale, part_lse, lse,
        scale_log2, num_queries, head_start, k.shape[0] // slc_block_len, block_table.stride(0),
        *block_indices.stride(), *q.stride()[:2], lse.stride(0), *page_strides(k, k_remote), *page_strides(v, v_remote),
        SLOTS=num_slots, SLOTS_P2=next_power_of_2(num_slots), GROUP=group, DK0=dk0, DK1=dk1, DV=head_dim_v,
        BLOCK_LEN=slc_block_len, HAS_REMOTE=k_remote is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        BLOCK_M=shared_rows, num_warps=tiles.shared_warps, maxnreg=tiles.shared_registers,
    )  # fmt: skip
    sum_parts(part, scale, out, head_start, rows=tiles.sum_rows, stages=tiles.sum_stages)
