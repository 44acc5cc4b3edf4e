"""Parts of the forward of selected attention on Hopper GPUs: as `forward_gathered`, with the copies of `hopper.pages`.

Products of a tile's 64 rows and a block's 64 keys: S = Q K^T and O = P V with P from registers. S of the next tile is
issued before the softmax of this one. Two programs share a multiprocessor: 97 KB (Dk 128, four stages) or 112 KB (Dk
192, three) and half the registers each.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.common.hopper import dot, thread_barrier
from nsa_kernels.common.launch import launchable
from nsa_kernels.selected.hopper.pages import BOX_COLUMNS, ROWS, boxes, copy_tiles, load_pages, place
from nsa_kernels.selected.index import BlockIndex
from nsa_kernels.selected.pages import page_strides


@gluon.jit
def _attend_tiles(
    begin, end, part_base, entries, scale, part_lse, scale_log2,
    key_tile, key_tail_tile, value_tile, q_tiles, q_tail_tiles, part_tiles, ready, done,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The warps with the tensor cores: a part of the output for every tile."""
    QUERIES: gl.constexpr = ROWS // GROUP
    WIDTH: gl.constexpr = value_tile.shape[1]
    dtype: gl.constexpr = key_tile.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide_layout, 2)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, wide_layout))
    no_scores = gl.zeros([ROWS, 64], gl.float32, scores_layout)
    no_out = gl.zeros([ROWS, WIDTH], gl.float32, wide_layout)
    # The next tile's scores are on their way while this one is worked on.
    mbarrier.wait(ready.index(0), 0)
    scores = dot(q_tiles.index(0), q_tail_tiles.index(0), key_tile, key_tail_tile, no_scores, TAIL)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    for number in range(gl.cdiv(end - begin, QUERIES)):
        stage, following = number % STAGES, number + 1
        mbarrier.wait(ready.index(following % STAGES), (following // STAGES) % 2)
        q_tile, q_tail_tile = q_tiles.index(following % STAGES), q_tail_tiles.index(following % STAGES)
        next_scores = dot(q_tile, q_tail_tile, key_tile, key_tail_tile, no_scores, TAIL)
        at = begin + number * QUERIES + row // GROUP
        entry = gl.load(entries + gl.minimum(at, end - 1))
        top = gl.max(scores, 1) * scale_log2
        p = gl.exp2(scores * scale_log2 - top[:, None])
        total = gl.convert_layout(gl.sum(p, 1), row.type.layout, assert_trivial=True)
        top = gl.convert_layout(top, row.type.layout, assert_trivial=True)
        out = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), value_tile, no_out, use_acc=False, is_async=True)
        scores, out = warpgroup_mma_wait(0, deps=(next_scores, out))
        largest = gl.maximum(gl.max(gl.abs(out), 1), 1e-30)
        part_tiles.index(stage).store((out * (1 / largest)[:, None]).to(gl.float16))
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(done.index(stage))
        part_row = (part_base + entry) * GROUP + row % GROUP
        gl.store(scale + part_row, largest / total, mask=at < end)
        gl.store(part_lse + part_row, top + gl.log2(total), mask=at < end)


@launchable
@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_lists", "num_blocks", "head_start", "num_local_pages"])
def _gathered_kernel(
    q, part, k, v, k_remote, v_remote, block_table, entries, offsets, item_offsets, item_list,
    scale, part_lse,
    scale_log2, num_queries, num_heads, num_lists, num_blocks, head_start, num_local_pages, stride_table,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr, HAS_REMOTE: gl.constexpr,
    ITEM_QUERIES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One work item: a block against some of the queries that chose it."""
    item = gl.program_id(0)
    if item >= gl.load(item_offsets + num_lists):
        return
    QUERIES: gl.constexpr = ROWS // GROUP
    dtype: gl.constexpr = q.dtype
    head, block, begin, end = place(item, offsets, item_offsets, item_list, num_heads, num_blocks, ITEM_QUERIES)
    kv_head = head_start + head

    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BOXES: gl.constexpr = WIDTH // BOX_COLUMNS
    box_shape: gl.constexpr = [STAGES * BOXES * QUERIES, 1, GROUP, BOX_COLUMNS]
    q_boxes = gl.allocate_shared_memory(dtype, box_shape, q.layout)
    part_boxes = q_boxes._reinterpret(gl.float16, box_shape, part.layout)
    q_tiles = q_boxes._reinterpret(dtype, [STAGES, ROWS, WIDTH], tile_layout)
    part_tiles = q_boxes._reinterpret(gl.float16, [STAGES, ROWS, WIDTH], tile_layout)
    key_tile = gl.allocate_shared_memory(dtype, [64, WIDTH], tile_layout)
    q_tail_boxes, q_tail_tiles, key_tail_tile = q_boxes, q_tiles, key_tile  # not read without a tail
    if TAIL:
        q_tail_boxes = gl.allocate_shared_memory(dtype, [STAGES * QUERIES, 1, GROUP, BOX_COLUMNS], q.layout)
        q_tail_tiles = q_tail_boxes._reinterpret(dtype, [STAGES, ROWS, BOX_COLUMNS], tile_layout)
        key_tail_tile = gl.allocate_shared_memory(dtype, [64, BOX_COLUMNS], tile_layout)
    value_tile = gl.allocate_shared_memory(dtype, [64, WIDTH], tile_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
    page = gl.load(block_table + kv_head * stride_table + block)
    load_pages(
        key_tile, key_tail_tile, value_tile, k, v, k_remote, v_remote, page, kv_head, num_local_pages,
        stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
        TAIL, HAS_REMOTE,
    )  # fmt: skip

    part_base = head * num_queries * SLOTS
    gl.warp_specialize(
        [
            (_attend_tiles, (
                begin, end, part_base, entries, scale, part_lse, scale_log2,
                key_tile, key_tail_tile, value_tile, q_tiles, q_tail_tiles, part_tiles, ready, done,
                SLOTS, GROUP, STAGES, TAIL,
            )),
            (copy_tiles, (
                q, None, part, entries, begin, end, kv_head * GROUP, part_base,
                q_boxes, q_tail_boxes, None, part_boxes, part_boxes, ready, done,
                SLOTS, GROUP, STAGES, 1, BOXES, TAIL, False,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    block_table: Tensor,
    index: BlockIndex,
    part: Tensor,
    scale: Tensor,
    part_lse: Tensor,
    *,
    head_start: int,
    slc_block_len: int,
    scale_log2: float,
) -> None:
    """As `forward_gathered.attend_gathered`, for what `tiles.hopper_takes`."""
    num_heads, num_queries, num_slots, group, dim_v = part.shape
    tail = q.shape[2] > dim_v
    _gathered_kernel[(index.max_items,)](
        boxes(q, group), boxes(part.view(-1, group, dim_v), group), k, v, k_remote, v_remote,
        block_table, index.entries, index.offsets, index.item_offsets, index.item_list,
        scale, part_lse,
        scale_log2, num_queries, num_heads, index.num_lists, block_table.shape[1], head_start,
        k.shape[0] // slc_block_len, block_table.stride(0), *page_strides(k, k_remote), *page_strides(v, v_remote),
        SLOTS=num_slots, GROUP=group, WIDTH=dim_v, TAIL=tail, HAS_REMOTE=k_remote is not None,
        ITEM_QUERIES=index.item_queries,
        STAGES=3 if tail else 4, num_warps=4, maxnreg=128,
    )  # fmt: skip
