"""Pages of keys and values for the selected branch, read where they lie.

A page is one selection block of one key-value head. Local page p is rows p*l' .. (p+1)*l' of [R, Hkv, D]; the pages
from R // l' on are remote ones, [pages, l', D], possibly strided views of one buffer that holds keys and values side
by side. Kernels choose between the two by page number, so nothing is ever copied together.
"""

import triton
import triton.language as tl
from torch import Tensor


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
