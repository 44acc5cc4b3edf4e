"""Exchanges of whole parts: what a member put for each other member, copied or added up by those it is for.

    slot        begins int64 [members + 1], then the rows: part r of them, begins[r] .. begins[r + 1], is for member r
    copy        out[received from 0 | from 1 | ...]
    sum         out = part of 0 + part of 1 + ..., in that order: the same bits in every run

An all-gather puts one part for everybody (all begins 0), a reduce-scatter equal ones, an all-to-all any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.exchange.mailbox import FLAG_BYTES, Mailbox, aligned, slot_to_put, slot_to_take

_COPIED = 16384  # bytes a program
_MOST_PROGRAMS = 512  # of one member's part


def header_bytes(num_members: int) -> int:
    """In front of the rows in a slot."""
    return aligned(8 * (num_members + 1))


@launchable
@triton.jit(do_not_specialize=["member", "slot_bytes", "num_words"])
def _put_kernel(bases, epoch, begins, x, member, slot_bytes, num_words, offset_bytes,
                HEADER: tl.constexpr, LANES: tl.constexpr, FLAGS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    slot = slot_to_put(bases, epoch, member, slot_bytes, FLAGS)
    if HEADER > 0:
        lane = tl.arange(0, LANES)
        there = (lane < HEADER) & (tl.program_id(0) == 0)
        tl.store(slot.to(tl.pointer_type(tl.int64)) + lane, tl.load(begins + lane, mask=there), mask=there)
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    target = tl.multiple_of((slot + offset_bytes).to(tl.pointer_type(x.dtype.element_ty)), 16)
    step = tl.num_programs(0).to(tl.int64) * WORDS
    while tl.min(at) < num_words:
        tl.store(target + at, tl.load(x + at, mask=at < num_words), mask=at < num_words)
        at += step


@launchable
@triton.jit(do_not_specialize=["slot_bytes", "member", "offset_bytes"])
def _copy_kernel(bases, epoch, out, out_begins, member, slot_bytes, offset_bytes, row_words,
                 FLAGS: tl.constexpr, WORDS: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Program (i, s): pieces i, i + programs, ... of what member s put for this one. SHARED: it put one for all."""
    source = tl.program_id(1)
    slot = slot_to_take(bases, epoch, source, slot_bytes, FLAGS)
    first, stop = tl.load(out_begins + source) * row_words, tl.load(out_begins + source + 1) * row_words
    begin = first * 0
    if not SHARED:
        begin = tl.load(slot.to(tl.pointer_type(tl.int64)) + member) * row_words
    words = tl.multiple_of((slot + offset_bytes).to(tl.pointer_type(out.dtype.element_ty)), 16)
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    step = tl.num_programs(0).to(tl.int64) * WORDS
    while tl.min(at) < stop - first:
        inside = at < stop - first
        tl.store(out + first + at, tl.load(words + begin + at, mask=inside), mask=inside)
        at += step


@launchable
@triton.jit(do_not_specialize=["slot_bytes", "member", "num_words"])
def _sum_kernel(bases, epoch, out, member, slot_bytes, num_words,
                MEMBERS: tl.constexpr, FLAGS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = at < num_words
    total = tl.zeros([WORDS], out.dtype.element_ty)
    for source in range(MEMBERS):
        slot = slot_to_take(bases, epoch, source, slot_bytes, FLAGS)
        given = tl.multiple_of(slot.to(tl.pointer_type(out.dtype.element_ty)), 16)
        total += tl.load(given + member.to(tl.int64) * num_words + at, mask=inside, other=0.0)
    tl.store(out + at, total, mask=inside)


def as_words(x: Tensor, row_bytes: int) -> Tensor:
    """Contiguous `x` as a row of the widest integers, 8 bytes at most, of which `row_bytes` are whole."""
    flat = x.view(-1).view(torch.uint8)
    for dtype in (torch.int64, torch.int32, torch.int16):
        if row_bytes % dtype.itemsize == 0:
            return flat.view(dtype)
    return flat


def put(box: Mailbox, x: Tensor, offset_bytes: int = 0, begins: Tensor | None = None) -> None:
    """Contiguous `x` into the own slot, `offset_bytes` from its beginning; `begins` int64 [members + 1] in front."""
    words = as_words(x, x.nbytes)
    per_program = _COPIED // words.element_size()
    grid = (max(1, min(_MOST_PROGRAMS, cdiv(words.numel(), per_program))),)
    header = 0 if begins is None else len(begins)
    _put_kernel[grid](
        box.bases, box.epoch, begins, words, box.member, box.slot_bytes, words.numel(), offset_bytes,
        HEADER=header, LANES=next_power_of_2(max(1, header)), FLAGS=FLAG_BYTES, WORDS=per_program, num_warps=8,
    )  # fmt: skip


def copy_parts(
    box: Mailbox, out: Tensor, out_begins: Tensor, row_bytes: int, offset_bytes: int = 0, *, shared: bool
) -> None:
    """What every member put for this one into contiguous `out`.

    out_begins  int64 [members + 1]: where the rows of each member begin; a row is `row_bytes` of every member's
    shared      every member put one part, for all
    """
    words = as_words(out, row_bytes)
    per_program = _COPIED // words.element_size()
    programs = cdiv(words.numel(), box.num_members * per_program)
    grid = (max(1, min(cdiv(_MOST_PROGRAMS, box.num_members), programs)), box.num_members)
    _copy_kernel[grid](
        box.bases, box.epoch, words, out_begins, box.member, box.slot_bytes, offset_bytes,
        row_bytes // words.element_size(), FLAGS=FLAG_BYTES, WORDS=per_program, SHARED=shared, num_warps=8,
    )  # fmt: skip


def sum_parts(box: Mailbox, out: Tensor) -> None:
    """The sum over members, in their order, of the equal parts that each put for this one, in the dtype of `out`."""
    words = 1024
    _sum_kernel[(cdiv(out.numel(), words),)](
        box.bases, box.epoch, out, box.member, box.slot_bytes, out.numel(),
        MEMBERS=box.num_members, FLAGS=FLAG_BYTES, WORDS=words, num_warps=4,
    )  # fmt: skip
