"""Pages of keys and values for the selected branch, read where they lie.

A page is one selection block of one key-value head. Local page p is rows p*l' .. (p+1)*l' of [R, Hkv, D]; the pages
from R // l' on are remote ones, [pages, l', D], possibly strided views of one buffer that holds keys and values side
by side. Kernels choose between the two by page number, so nothing is ever copied together.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import split_head_dim
from nsa_kernels.contracts import SelectedCall


@triton.jit
def load_page(
    local, remote, page, head,
    num_local_pages, stride_row, stride_head, stride_page, stride_page_row,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, LEN: tl.constexpr, HAS_REMOTE: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of a page of `head`, in the dtype of `local`: [LEN, WIDTH]."""
    row = tl.arange(0, LEN)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    if HAS_REMOTE:
        if page >= num_local_pages:
            from_remote = remote + (page - num_local_pages).to(tl.int64) * stride_page
            tile = tl.load(from_remote + row * stride_page_row + column).to(local.dtype.element_ty)
        else:
            base = local + page.to(tl.int64) * LEN * stride_row + head * stride_head
            tile = tl.load(base + row * stride_row + column)
    else:
        base = local + page.to(tl.int64) * LEN * stride_row + head * stride_head
        tile = tl.load(base + row * stride_row + column)
    return tile


def page_strides(local: Tensor, remote: Tensor | None) -> tuple[int, int, int, int]:
    """(row, head) strides of local pages, (page, row) strides of remote ones: what the kernels above take."""
    stride_page, stride_page_row = remote.stride()[:2] if remote is not None else (0, 0)
    return local.stride(0), local.stride(1), stride_page, stride_page_row


@triton.jit
def put(at, total, ADD: tl.constexpr):
    """Write `total`, or add it to what is there."""
    if ADD:
        total += tl.load(at).to(tl.float32)
    tl.store(at, total.to(at.dtype.element_ty))


@launchable
@triton.jit(do_not_specialize=["num_kv_heads", "num_local_pages"])
def _copy_kernel(
    local, remote, block_table, blocks,
    copies,
    num_kv_heads, num_local_pages, stride_table, stride_row, stride_head, stride_page, stride_page_row,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, LEN: tl.constexpr, HAS_REMOTE: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0), tl.program_id(1)
    page = tl.load(block_table + head * stride_table + tl.load(blocks + number))
    tile = load_page(
        local, remote, page, head, num_local_pages, stride_row, stride_head, stride_page, stride_page_row,
        FIRST, WIDTH, LEN, HAS_REMOTE,
    )  # fmt: skip
    row = number.to(tl.int64) * LEN + tl.arange(0, LEN)[:, None]
    tl.store(copies + (row * num_kv_heads + head) * HEAD_DIM + FIRST + tl.arange(0, WIDTH)[None, :], tile)


@launchable
@triton.jit(do_not_specialize=["num_kv_heads", "num_local_pages"])
def _add_kernel(
    grads, block_table, blocks,
    local, remote,
    num_kv_heads, num_local_pages, stride_table,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, LEN: tl.constexpr, HAS_REMOTE: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0), tl.program_id(1)
    page = tl.load(block_table + head * stride_table + tl.load(blocks + number))
    in_page = tl.arange(0, LEN)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    row = number.to(tl.int64) * LEN + in_page
    grad = tl.load(grads + (row * num_kv_heads + head) * HEAD_DIM + column)
    if not HAS_REMOTE:  # every page is local: the branch below is never taken
        remote = local
    if page >= num_local_pages:
        at = (page - num_local_pages).to(tl.int64) * LEN + in_page
        put(remote + at * HEAD_DIM + column, grad, True)
    else:
        at = (page.to(tl.int64) * LEN + in_page) * num_kv_heads + head
        put(local + at * HEAD_DIM + column, grad, True)


def copied_pages(call: SelectedCall, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks `blocks` int32 [B] of every head, one behind the other: k [B * l', Hkv, Dk], v [B * l', Hkv, Dv]."""

    def copied(local: Tensor, remote: Tensor | None) -> Tensor:
        length, (num_heads, head_dim) = call.slc_block_len, local.shape[1:]
        copies = torch.empty(len(blocks) * length, num_heads, head_dim, dtype=local.dtype, device=local.device)
        for first, width in _parts_of(head_dim):
            _copy_kernel[(len(blocks), num_heads)](
                local, remote, call.block_table, blocks,
                copies,
                num_heads, len(local) // length, call.block_table.stride(0), *page_strides(local, remote),
                FIRST=first, WIDTH=width, HEAD_DIM=head_dim, LEN=length, HAS_REMOTE=remote is not None,
            )  # fmt: skip
        return copies

    return copied(call.k, call.k_remote), copied(call.v, call.v_remote)


def add_to_pages(dk: Tensor, dv: Tensor, blocks: Tensor, call: SelectedCall, sums: Sequence[Tensor | None]) -> None:
    """Adds gradients of what `copied_pages` returned to those of the pages: fp32 dk, dv, dk_remote, dv_remote."""
    for grads, local, remote in zip((dk, dv), sums[:2], sums[2:], strict=True):
        assert local is not None
        for first, width in _parts_of(grads.shape[2]):
            _add_kernel[(len(blocks), grads.shape[1])](
                grads, call.block_table, blocks,
                local, remote,
                grads.shape[1], len(local) // call.slc_block_len, call.block_table.stride(0),
                FIRST=first, WIDTH=width, HEAD_DIM=grads.shape[2], LEN=call.slc_block_len,
                HAS_REMOTE=remote is not None,
            )  # fmt: skip


def _parts_of(head_dim: int) -> list[tuple[int, int]]:
    """(first column, columns) of the tiles of a page."""
    first, rest = split_head_dim(head_dim)
    return [(0, first), (first, rest)] if rest else [(0, first)]
