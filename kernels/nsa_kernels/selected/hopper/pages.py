"""Copies of the Hopper kernels of selected attention: tiles by TMA, pages by their addresses.

The G heads of a query are G contiguous rows of q, so a tile of 64 (query, head) rows is 64 / G boxes [1, G, 64] for
every 64 of its 64 or 128 columns. Laid out by columns and by query, the boxes of a stage are also one swizzled tile,
which the tensor cores read; the last 64 columns of 192 are a tile of their own, the tail. Of a program's warps one runs
`copy_tiles`, so that no other holds an address or waits for a row. While a tile is worked on, the next are on their
way; what comes of a tile leaves from the stage it came in.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_kernels.common.hopper import descriptor

ROWS = gl.constexpr(64)  # of a tile, (query, head) pairs
BOX_COLUMNS = gl.constexpr(64)  # that the 128-byte swizzle spans


def boxes(x: Tensor, group: int) -> TensorDescriptor:
    """x [T, H, D] of 16-bit elements, to be copied by boxes of `group` heads and 64 columns."""
    return descriptor(x, (1, group, BOX_COLUMNS.value))


@gluon.jit
def place(item, offsets, item_offsets, item_list, num_heads, num_blocks, ITEM_QUERIES: gl.constexpr):
    """Head and block of a work item, and its entries [begin, end)."""
    which = gl.load(item_list + item)
    head, block = (which // num_blocks) % num_heads, which % num_blocks
    begin = gl.load(offsets + which) + (item - gl.load(item_offsets + which)) * ITEM_QUERIES
    end = gl.minimum(begin + ITEM_QUERIES, gl.load(offsets + which + 1))
    return head, block, begin, end


@gluon.jit
def load_entries(entries, first, end, QUERIES: gl.constexpr):
    """Entries first .. first + QUERIES as scalars; past the end the last one again."""
    result = ()
    for i in gl.static_range(QUERIES):
        result = result + (gl.load(entries + gl.minimum(first + i, end - 1)),)  # type: ignore[assignment]  # noqa: RUF005
    return result


@gluon.jit
def copy_tiles(
    q, grad_out, parts, entries, begin, end, q_head, part_base,
    q_boxes, q_tail_boxes, do_boxes, part_boxes, part_tail_boxes, ready, done,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
    BOXES: gl.constexpr, TAIL: gl.constexpr, PART_TAIL: gl.constexpr,
):  # fmt: skip
    """The copying warp: brings tile after tile into the stages, and sends off the parts that came of them.

    A tile is ROWS / GROUP entries of q and, unless it is None, of grad_out. AHEAD tiles more than there are come in,
    the last entry again, for those who read so far ahead. A row of q, grad_out and parts is BOXES boxes; with TAIL or
    PART_TAIL that of q or of the parts is one more.
    """
    QUERIES: gl.constexpr = ROWS // GROUP
    BYTES: gl.constexpr = 2 * ROWS * BOX_COLUMNS * (BOXES + (1 if TAIL else 0) + (0 if grad_out is None else BOXES))
    tiles = gl.cdiv(end - begin, QUERIES)
    for number in range(tiles + STAGES):
        stage = number % STAGES
        arriving = load_entries(entries, begin + number * QUERIES, end, QUERIES)
        if number >= STAGES:
            first = begin + (number - STAGES) * QUERIES
            leaving = load_entries(entries, first, end, QUERIES)
            mbarrier.wait(done.index(stage), (number // STAGES - 1) % 2)
            for i in gl.static_range(QUERIES):
                if first + i < end:
                    for piece in gl.static_range(BOXES):
                        box = (stage * BOXES + piece) * QUERIES + i
                        tma.async_copy_shared_to_global(
                            parts, [part_base + leaving[i], 0, piece * BOX_COLUMNS], part_boxes.index(box)
                        )
                    if PART_TAIL:
                        tma.async_copy_shared_to_global(
                            parts,
                            [part_base + leaving[i], 0, BOXES * BOX_COLUMNS],
                            part_tail_boxes.index(stage * QUERIES + i),
                        )
            tma.store_wait(0)
        if number < tiles + AHEAD:
            mbarrier.expect(ready.index(stage), BYTES)
            for piece in gl.static_range(BOXES):
                for i in gl.static_range(QUERIES):
                    t = arriving[i] // SLOTS
                    box = (stage * BOXES + piece) * QUERIES + i
                    at = [t, q_head, piece * BOX_COLUMNS]
                    tma.async_copy_global_to_shared(q, at, ready.index(stage), q_boxes.index(box))
                    if grad_out is not None:
                        tma.async_copy_global_to_shared(grad_out, at, ready.index(stage), do_boxes.index(box))
            if TAIL:
                for i in gl.static_range(QUERIES):
                    rest = [arriving[i] // SLOTS, q_head, BOXES * BOX_COLUMNS]
                    box = q_tail_boxes.index(stage * QUERIES + i)
                    tma.async_copy_global_to_shared(q, rest, ready.index(stage), box)


@gluon.jit
def load_pages(
    key_tile, key_tail_tile, value_tile, k, v, k_remote, v_remote, page, head, num_local_pages,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    TAIL: gl.constexpr, HAS_REMOTE: gl.constexpr,
):  # fmt: skip
    """A page of keys and of values of `head` into shared memory, where products may read them."""
    _load_page(
        key_tile, k, k_remote, page, head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
        0, HAS_REMOTE,
    )  # fmt: skip
    if TAIL:
        _load_page(
            key_tail_tile, k, k_remote, page, head, num_local_pages, stride_kr, stride_kh, stride_kp, stride_kpr,
            key_tile.shape[1], HAS_REMOTE,
        )  # fmt: skip
    _load_page(
        value_tile, v, v_remote, page, head, num_local_pages, stride_vr, stride_vh, stride_vp, stride_vpr,
        0, HAS_REMOTE,
    )  # fmt: skip
    fence_async_shared()


@gluon.jit
def _load_page(
    page_buffer, local, remote, page, head, num_local_pages, stride_row, stride_head, stride_page, stride_page_row,
    FIRST: gl.constexpr, HAS_REMOTE: gl.constexpr,
):  # fmt: skip
    """A page of `head`, in the dtype of `local`, into shared memory: its columns from FIRST on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    column = FIRST + gl.arange(0, page_buffer.shape[1], gl.SliceLayout(0, layout))[None, :]
    if HAS_REMOTE:
        if page >= num_local_pages:
            from_remote = remote + (page - num_local_pages).to(gl.int64) * stride_page
            page_buffer.store(gl.load(from_remote + row * stride_page_row + column).to(local.dtype.element_ty))
        else:
            base = local + page.to(gl.int64) * 64 * stride_row + head * stride_head
            page_buffer.store(gl.load(base + row * stride_row + column))
    else:
        base = local + page.to(gl.int64) * 64 * stride_row + head * stride_head
        page_buffer.store(gl.load(base + row * stride_row + column))
