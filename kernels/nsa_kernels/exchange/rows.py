"""Rows of keys and values [rows, H, D] between members: put side by side in a slot, taken by a table, or added up.

slot        [rows, H, Dk + Dv], from `offset_bytes` on
take        k[i], v[i] = own[row[i]] where origin[i] is -1, nothing's (0) where row[i] is -1, else row[i] of
            what member origin[i] put
add         dk[i], dv[i] = own[own_row[i]] + rows table[m, :, number[i]] of what member m put, for m in the members'
            order, but for -1: the same bits in every run; summed in fp32 or better, rounded once
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.exchange.mailbox import FLAG_BYTES, Mailbox, slot_to_put, slot_to_take

_ROWS = 16  # of a program


@triton.jit
def _part(x, row, head, stride_row, stride_head, inside, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Addresses and mask of [rows, WIDE] columns of a head."""
    column = tl.arange(0, WIDE)[None, :]
    at = x + row[:, None] * stride_row + head * stride_head + column
    return at, inside[:, None] & (column < DIM)


@launchable
@triton.jit(do_not_specialize=["member", "slot_bytes", "offset_bytes", "num_rows"])
def _put_kernel(bases, epoch, k, v, rows, member, slot_bytes, offset_bytes, num_rows,
                num_heads, stride_kt, stride_kh, stride_vt, stride_vh,
                DIM_K: tl.constexpr, WIDE_K: tl.constexpr, DIM_V: tl.constexpr, WIDE_V: tl.constexpr,
                CHOSEN: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, FLAGS: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, inside = tl.program_id(1).to(tl.int64), at < num_rows
    row = at
    if CHOSEN:
        row = tl.load(rows + at, mask=inside, other=0).to(tl.int64)
    slot = slot_to_put(bases, epoch, member, slot_bytes, FLAGS) + offset_bytes
    if WIDEN:
        words = tl.multiple_of(slot.to(tl.pointer_type(tl.float32)), 16)
    else:
        words = tl.multiple_of(slot.to(tl.pointer_type(k.dtype.element_ty)), 16)
    width: tl.constexpr = DIM_K + DIM_V
    from_k, mask_k = _part(k, row, head, stride_kt, stride_kh, inside, DIM_K, WIDE_K)
    from_v, mask_v = _part(v, row, head, stride_vt, stride_vh, inside, DIM_V, WIDE_V)
    to_k, _ = _part(words, at, head, num_heads * width, width, inside, DIM_K, WIDE_K)
    to_v, _ = _part(words + DIM_K, at, head, num_heads * width, width, inside, DIM_V, WIDE_V)
    tl.store(to_k, tl.load(from_k, mask=mask_k).to(words.dtype.element_ty), mask=mask_k)
    tl.store(to_v, tl.load(from_v, mask=mask_v).to(words.dtype.element_ty), mask=mask_v)


@launchable
@triton.jit(do_not_specialize=["slot_bytes", "offset_bytes", "num_rows"])
def _take_kernel(bases, epoch, k, v, own_k, own_v, origin, row, slot_bytes, offset_bytes, num_rows,
                 num_heads, stride_kt, stride_kh, stride_vt, stride_vh,
                 DIM_K: tl.constexpr, WIDE_K: tl.constexpr, DIM_V: tl.constexpr, WIDE_V: tl.constexpr,
                 OWN: tl.constexpr, ROWS: tl.constexpr, FLAGS: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, inside = tl.program_id(1).to(tl.int64), at < num_rows
    member = tl.load(origin + at, mask=inside, other=0)
    source = tl.load(row + at, mask=inside, other=-1).to(tl.int64)
    width: tl.constexpr = DIM_K + DIM_V
    there = (source >= 0) & (member >= 0)
    slots = slot_to_take(bases, epoch, tl.maximum(member, 0), slot_bytes, FLAGS) + offset_bytes
    words = tl.multiple_of(slots.to(tl.pointer_type(k.dtype.element_ty)), 16)[:, None]
    words += (tl.maximum(source, 0) * num_heads + head)[:, None] * width
    column_k, column_v = tl.arange(0, WIDE_K)[None, :], tl.arange(0, WIDE_V)[None, :]
    found_k = tl.load(words + column_k, mask=there[:, None] & (column_k < DIM_K), other=0.0)
    found_v = tl.load(words + DIM_K + column_v, mask=there[:, None] & (column_v < DIM_V), other=0.0)
    if OWN:
        here = (source >= 0) & (member < 0)
        from_k, mask_k = _part(own_k, source, head, stride_kt, stride_kh, here, DIM_K, WIDE_K)
        from_v, mask_v = _part(own_v, source, head, stride_vt, stride_vh, here, DIM_V, WIDE_V)
        found_k = tl.where(here[:, None], tl.load(from_k, mask=mask_k, other=0.0), found_k)
        found_v = tl.where(here[:, None], tl.load(from_v, mask=mask_v, other=0.0), found_v)
    to_k, mask_k = _part(k, at, head, num_heads * DIM_K, DIM_K, inside, DIM_K, WIDE_K)
    to_v, mask_v = _part(v, at, head, num_heads * DIM_V, DIM_V, inside, DIM_V, WIDE_V)
    tl.store(to_k, found_k, mask=mask_k)
    tl.store(to_v, found_v, mask=mask_v)


@launchable
@triton.jit(do_not_specialize=["slot_bytes", "offset_bytes", "num_rows", "stride_member", "stride_copy"])
def _add_kernel(bases, epoch, dk, dv, own_k, own_v, own_row, number, table, slot_bytes, offset_bytes, num_rows,
                num_heads, stride_member, stride_copy, stride_kt, stride_kh, stride_vt, stride_vh,
                DIM_K: tl.constexpr, WIDE_K: tl.constexpr, DIM_V: tl.constexpr, WIDE_V: tl.constexpr,
                OWN: tl.constexpr, SUM: tl.constexpr, MEMBERS: tl.constexpr, COPIES: tl.constexpr,
                ROWS: tl.constexpr, FLAGS: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, inside = tl.program_id(1).to(tl.int64), at < num_rows
    width: tl.constexpr = DIM_K + DIM_V
    total_k, total_v = tl.zeros([ROWS, WIDE_K], SUM), tl.zeros([ROWS, WIDE_V], SUM)
    if OWN:
        row = tl.load(own_row + at, mask=inside, other=0).to(tl.int64)
        from_k, mask_k = _part(own_k, row, head, stride_kt, stride_kh, inside, DIM_K, WIDE_K)
        from_v, mask_v = _part(own_v, row, head, stride_vt, stride_vh, inside, DIM_V, WIDE_V)
        total_k = tl.load(from_k, mask=mask_k, other=0.0).to(SUM)
        total_v = tl.load(from_v, mask=mask_v, other=0.0).to(SUM)
    which = tl.load(number + at, mask=inside, other=-1).to(tl.int64)
    column_k, column_v = tl.arange(0, WIDE_K)[None, :], tl.arange(0, WIDE_V)[None, :]
    if tl.max(which) >= 0:
        for member in range(MEMBERS):
            slot = slot_to_take(bases, epoch, member, slot_bytes, FLAGS) + offset_bytes
            words = tl.multiple_of(slot.to(tl.pointer_type(SUM)), 16)
            for copy in range(COPIES):
                at_table = table + member * stride_member + copy * stride_copy + which
                row = tl.load(at_table, mask=which >= 0, other=-1).to(tl.int64)
                given = words + ((tl.maximum(row, 0) * num_heads + head) * width)[:, None]
                there = (row >= 0)[:, None]
                total_k += tl.load(given + column_k, mask=there & (column_k < DIM_K), other=0.0)
                total_v += tl.load(given + DIM_K + column_v, mask=there & (column_v < DIM_V), other=0.0)
    to_k, mask_k = _part(dk, at, head, num_heads * DIM_K, DIM_K, inside, DIM_K, WIDE_K)
    to_v, mask_v = _part(dv, at, head, num_heads * DIM_V, DIM_V, inside, DIM_V, WIDE_V)
    tl.store(to_k, total_k.to(dk.dtype.element_ty), mask=mask_k)
    tl.store(to_v, total_v.to(dv.dtype.element_ty), mask=mask_v)


def put_rows(
    box: Mailbox, k: Tensor, v: Tensor, rows: Tensor | None, offset_bytes: int = 0, *, widen: bool = False
) -> None:
    """k [R, H, Dk], v [R, H, Dv], all rows or int64 `rows` of them, side by side into the own slot.

    widen       16-bit numbers as fp32
    """
    num_rows = len(k) if rows is None else len(rows)
    if num_rows:
        _put_kernel[(cdiv(num_rows, _ROWS), k.shape[1])](
            box.bases, box.epoch, k, v, rows, box.member, box.slot_bytes, offset_bytes, num_rows,
            k.shape[1], *k.stride()[:2], *v.stride()[:2],
            **_dims(k, v), CHOSEN=rows is not None, WIDEN=widen and k.element_size() < 4,
            ROWS=_ROWS, FLAGS=FLAG_BYTES, num_warps=4,
        )  # fmt: skip


def take_rows(
    box: Mailbox, own: tuple[Tensor, Tensor] | None, like: tuple[Tensor, Tensor], origin: Tensor, row: Tensor,
    offset_bytes: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """k [len(row), H, Dk], v [.., Dv] by the tables int32 `origin` and `row`, in the dtype of `like`.

    own         k, v that rows with the origin -1 come from
    """
    k, v = (x.new_empty(len(row), *x.shape[1:]) for x in like)
    if len(row):
        strides = (0, 0, 0, 0) if own is None else (*own[0].stride()[:2], *own[1].stride()[:2])
        _take_kernel[(cdiv(len(row), _ROWS), k.shape[1])](
            box.bases, box.epoch, k, v, *(own or (None, None)), origin, row, box.slot_bytes, offset_bytes, len(row),
            k.shape[1], *strides, **_dims(k, v), OWN=own is not None, ROWS=_ROWS, FLAGS=FLAG_BYTES, num_warps=4,
        )  # fmt: skip
    return k, v


def add_rows(
    box: Mailbox, own: tuple[Tensor, Tensor] | None, out: tuple[Tensor, Tensor], own_row: Tensor | None,
    number: Tensor, table: Tensor, offset_bytes: int = 0,
) -> None:  # fmt: skip
    """Sums of what members put, in fp32 or better, into contiguous `out`, dk [R, H, Dk] and dv [R, H, Dv].

    own, own_row        what the sum begins with, and int64 [R], which of its rows; None: nothing
    number              int32 [R]: column of the table, -1 for none
    table               int32 [members, copies, columns], or [1, copies, columns], the same for all
    """
    dk, dv = out
    if not len(dk):
        return
    strides = (0, 0, 0, 0) if own is None else (*own[0].stride()[:2], *own[1].stride()[:2])
    exact = dk.dtype == torch.float64
    _add_kernel[(cdiv(len(dk), _ROWS), dk.shape[1])](
        box.bases, box.epoch, dk, dv, *(own or (None, None)), own_row, number, table, box.slot_bytes, offset_bytes,
        len(dk), dk.shape[1], table.stride(0) if len(table) > 1 else 0, table.stride(1), *strides, **_dims(dk, dv),
        OWN=own is not None, SUM=tl.float64 if exact else tl.float32, MEMBERS=box.num_members, COPIES=table.shape[1],
        ROWS=_ROWS, FLAGS=FLAG_BYTES, num_warps=4,
    )  # fmt: skip


def _dims(k: Tensor, v: Tensor) -> dict[str, int]:
    dim_k, dim_v = k.shape[2], v.shape[2]
    return {"DIM_K": dim_k, "WIDE_K": next_power_of_2(dim_k), "DIM_V": dim_v, "WIDE_V": next_power_of_2(dim_v)}
