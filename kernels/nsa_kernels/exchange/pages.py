"""Chosen blocks of keys and values, read where their owners put them; and their gradients, added where they belong.

marks       uint8 [Hkv, blocks]: what some query of this member chose
taken       [Hkv * num_places, l', Dk + Dv]: block b of head h at place `h * num_places + place[b]`, if it is marked;
            nothing is written elsewhere
gradients   in a slot: marks first, then fp32 or better [Hkv * num_blocks, l', Dk + Dv] by block
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.exchange.mailbox import FLAG_BYTES, Mailbox, aligned, slot_to_put, slot_to_take

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@launchable
@triton.jit(do_not_specialize=["num_entries", "num_heads", "num_blocks"])
def _mark_kernel(marks, block_indices, num_entries, num_heads, num_blocks, stride_t, stride_h, stride_n,
                 SLOTS: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    head = (entry // SLOTS) % num_heads
    at = entry // (SLOTS * num_heads) * stride_t + head * stride_h + entry % SLOTS * stride_n
    block = tl.load(block_indices + at, mask=entry < num_entries, other=-1)
    tl.store(marks + head * num_blocks + block, tl.full([ENTRIES], 1, tl.uint8), mask=block >= 0)


def mark_blocks(block_indices: Tensor, num_blocks: int) -> Tensor:
    """marks of block_indices [T, Hkv, n]."""
    num_heads, slots = block_indices.shape[1:]
    marks = torch.zeros(num_heads, num_blocks, dtype=torch.uint8, device=block_indices.device)
    if block_indices.numel():
        _mark_kernel[(cdiv(block_indices.numel(), 1024),)](
            marks, block_indices, block_indices.numel(), num_heads, num_blocks, *block_indices.stride(),
            SLOTS=slots, ENTRIES=1024,
        )  # fmt: skip
    return marks


@triton.jit
def _copy_page(source, target, stride_source, stride_target, DIM: tl.constexpr, WIDE: tl.constexpr, LEN: tl.constexpr):
    row, column = tl.arange(0, LEN)[:, None], tl.arange(0, WIDE)[None, :]
    mask = column < DIM
    tl.store(target + row * stride_target + column, tl.load(source + row * stride_source + column, mask=mask), mask)


@launchable
@triton.jit(do_not_specialize=["slot_bytes", "v_bytes", "first_head", "num_blocks", "num_places"])
def _take_kernel(bases, epoch, marks, blocks, owner, page, place, taken,
                 slot_bytes, v_bytes, first_head, num_heads, num_blocks, num_places,
                 DIM_K: tl.constexpr, WIDE_K: tl.constexpr, DIM_V: tl.constexpr, WIDE_V: tl.constexpr,
                 LEN: tl.constexpr, FLAGS: tl.constexpr):  # fmt: skip
    block, head = tl.load(blocks + tl.program_id(0)), tl.program_id(1).to(tl.int64)
    if tl.load(marks + head * num_blocks + block) > 0:
        slot = slot_to_take(bases, epoch, tl.load(owner + block), slot_bytes, FLAGS)
        row = tl.load(page + block).to(tl.int64) * LEN
        at = row * num_heads + first_head + head  # of the page's first row, in heads of a row
        target = taken + (head * num_places + tl.load(place + block)) * LEN * (DIM_K + DIM_V)
        k = tl.multiple_of(slot.to(tl.pointer_type(taken.dtype.element_ty)), 16) + at * DIM_K
        v = tl.multiple_of((slot + v_bytes).to(tl.pointer_type(taken.dtype.element_ty)), 16) + at * DIM_V
        _copy_page(k, target, num_heads * DIM_K, DIM_K + DIM_V, DIM_K, WIDE_K, LEN)
        _copy_page(v, target + DIM_K, num_heads * DIM_V, DIM_K + DIM_V, DIM_V, WIDE_V, LEN)


def take_pages(
    box: Mailbox, marks: Tensor, taken: Tensor, blocks: Tensor, owner: Tensor, page: Tensor, place: Tensor,
    *, v_bytes: int, first_head: int, num_heads: int, dim_k: int,
) -> None:  # fmt: skip
    """Copy the marked ones of `blocks`, from slots that hold k [R, num_heads, Dk] and, at `v_bytes`, v [R, .., Dv].

    taken       [heads * num_places, l', Dk + Dv], of the heads from `first_head` on; marks [heads, num_blocks]
    blocks      int32: those that may be copied; owner, page, place int32 [num_blocks]
    """
    if not len(blocks):
        return
    heads, dim_v = len(marks), taken.shape[2] - dim_k
    _take_kernel[(len(blocks), heads)](
        box.bases, box.epoch, marks, blocks, owner, page, place, taken.view(_BITS[taken.element_size()]),
        box.slot_bytes, v_bytes, first_head, num_heads, marks.shape[1], len(taken) // heads,
        DIM_K=dim_k, WIDE_K=next_power_of_2(dim_k), DIM_V=dim_v, WIDE_V=next_power_of_2(dim_v),
        LEN=taken.shape[1], FLAGS=FLAG_BYTES, num_warps=4,
    )  # fmt: skip


def gradient_slot_bytes(num_heads: int, num_blocks: int, block_len: int, dim: int, itemsize: int) -> int:
    """Of a slot with the gradients of `num_blocks` blocks."""
    return aligned(num_heads * num_blocks) + num_heads * num_blocks * block_len * dim * itemsize


@launchable
@triton.jit(do_not_specialize=["slot_bytes", "member", "first", "num_blocks", "num_places", "marks_bytes"])
def _put_gradients_kernel(bases, epoch, marks, place, dk, dv, member,
                          slot_bytes, marks_bytes, first, num_blocks, num_places,
                          stride_kp, stride_k, stride_vp, stride_v,
                          DIM_K: tl.constexpr, WIDE_K: tl.constexpr, DIM_V: tl.constexpr, WIDE_V: tl.constexpr,
                          LEN: tl.constexpr, FLAGS: tl.constexpr):  # fmt: skip
    here, head, count = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    slot = slot_to_put(bases, epoch, member, slot_bytes, FLAGS)
    at = tl.load(place + first + here)
    chosen = tl.load(marks + head * num_blocks + first + here)
    chosen = tl.where(at >= 0, chosen, 0)
    tl.store(slot.to(tl.pointer_type(tl.uint8)) + head * count + here, chosen)
    if chosen > 0:
        page = head * num_places + at
        words = tl.multiple_of((slot + marks_bytes).to(tl.pointer_type(dk.dtype.element_ty)), 16)
        target = words + (head * count + here) * LEN * (DIM_K + DIM_V)
        _copy_page(dk + page * stride_kp, target, stride_k, DIM_K + DIM_V, DIM_K, WIDE_K, LEN)
        _copy_page(dv + page * stride_vp, target + DIM_K, stride_v, DIM_K + DIM_V, DIM_V, WIDE_V, LEN)


def put_gradients(box: Mailbox, marks: Tensor, place: Tensor, dk: Tensor, dv: Tensor, blocks: range) -> None:
    """Gradients of marked pages, dk [heads * num_places, l', Dk], dv, of `blocks` into the own slot.

    place       int32 [num_blocks], -1 for those that are not in dk and dv
    """
    heads, (_, block_len, dim_k), dim_v = len(marks), dk.shape, dv.shape[2]
    _put_gradients_kernel[(len(blocks), heads)](
        box.bases, box.epoch, marks, place, dk, dv, box.member, box.slot_bytes, aligned(heads * len(blocks)),
        blocks.start, marks.shape[1], len(dk) // heads, *dk.stride()[:2], *dv.stride()[:2],
        DIM_K=dim_k, WIDE_K=next_power_of_2(dim_k), DIM_V=dim_v, WIDE_V=next_power_of_2(dim_v),
        LEN=block_len, FLAGS=FLAG_BYTES, num_warps=4,
    )  # fmt: skip


@launchable
@triton.jit(do_not_specialize=["slot_bytes", "member", "first", "count", "marks_bytes"])
def _add_gradients_kernel(bases, epoch, owner, page, dk, dv, member,
                          slot_bytes, marks_bytes, first, count, stride_kt, stride_kh, stride_vt, stride_vh,
                          MEMBERS: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr, WIDE: tl.constexpr,
                          LEN: tl.constexpr, ROWS: tl.constexpr, FLAGS: tl.constexpr):  # fmt: skip
    here, head, piece = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if tl.load(owner + first + here) == member:
        row = piece * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, WIDE)[None, :]
        is_k, is_v = column < DIM_K, (column >= DIM_K) & (column < DIM_K + DIM_V)
        token = tl.load(page + first + here).to(tl.int64) * LEN + row
        at_k = dk + token * stride_kt + head * stride_kh + column
        at_v = dv + token * stride_vt + head * stride_vh + column - DIM_K
        total = tl.load(at_k, mask=is_k, other=0.0) + tl.load(at_v, mask=is_v, other=0.0)
        for source in range(MEMBERS):
            slot = slot_to_take(bases, epoch, source, slot_bytes, FLAGS)
            chosen = tl.load(slot.to(tl.pointer_type(tl.uint8)) + head * count + here)
            if (source != member) & (chosen > 0):
                words = tl.multiple_of((slot + marks_bytes).to(tl.pointer_type(dk.dtype.element_ty)), 16)
                given = words + (head * count + here) * LEN * (DIM_K + DIM_V) + row * (DIM_K + DIM_V) + column
                total += tl.load(given, mask=is_k | is_v, other=0.0)
        tl.store(at_k, total, mask=is_k)
        tl.store(at_v, total, mask=is_v)


def add_gradients(
    box: Mailbox, owner: Tensor, page: Tensor, dk: Tensor, dv: Tensor, blocks: range, block_len: int
) -> None:
    """Add to dk [T, heads, Dk] and dv what other members found for own ones of `blocks`, in the members' order.

    owner, page     int32 [num_blocks]: who holds each block, and which of its pages that is
    """
    heads, dim_k, dim_v = dk.shape[1], dk.shape[2], dv.shape[2]
    rows = min(block_len, 16)
    _add_gradients_kernel[(len(blocks), heads, block_len // rows)](
        box.bases, box.epoch, owner, page, dk, dv, box.member, box.slot_bytes, aligned(heads * len(blocks)),
        blocks.start, len(blocks), *dk.stride()[:2], *dv.stride()[:2],
        MEMBERS=box.num_members, DIM_K=dim_k, DIM_V=dim_v, WIDE=next_power_of_2(dim_k + dim_v),
        LEN=block_len, ROWS=rows, FLAGS=FLAG_BYTES, num_warps=4,
    )  # fmt: skip
