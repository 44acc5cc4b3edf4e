"""Work items of the backward of selected attention on Hopper: as `backward_items`, with the copies of `hopper.pages`.

Products, all of a block's 64 keys and a tile's 64 rows: S^T = K Q^T and dP^T = V dO^T; then dV += P^T dO with
P from registers, dK += dS^T Q and dQ = dS K with dS from shared memory: dK and dV stay in registers, which fills them.
Two programs share a multiprocessor: 106 KB (D 128) and half the registers each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.common.hopper import thread_barrier
from nsa_kernels.common.launch import launchable
from nsa_kernels.selected.hopper.pages import BOX_COLUMNS, ROWS, copy_tiles, load_pages, place


@gluon.jit
def copy_stats(
    stats, stage, entries, first, end, rows, q_head, num_q_heads, stride_plane,
    SLOTS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Bring lse in log2, delta, gate and position of a tile's rows; past the end, of the last query again.

    By asynchronous copies: a load into registers would be waited for at the next fence.
    """
    row = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    t = gl.load(entries + gl.minimum(first + row // GROUP, end - 1)) // SLOTS
    at = rows + (t * num_q_heads + q_head + row % GROUP)
    for i in gl.static_range(4):
        async_copy.async_copy_global_to_shared(stats.index(stage * 4 + i), at + i * stride_plane)
    async_copy.commit_group()


@gluon.jit
def _work_on_tiles(
    item, block, begin, end, q_head, part_base, rows, entries, dq_scale, dkv_part,
    softmax_scale, scale_log2, num_q_heads, stride_plane,
    key_tile, value_tile, ds_tile, q_tiles, do_tiles, part_tiles, stats_tile, ready, done,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """The warps with the tensor cores: dK and dV of the block in registers, a part of dQ for every tile."""
    QUERIES: gl.constexpr = ROWS // GROUP
    dtype: gl.constexpr = key_tile.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide_layout, 2)
    column_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    key = gl.arange(0, 64, gl.SliceLayout(1, scores_layout))
    row_of_column = gl.arange(0, ROWS, column_layout)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, wide_layout))
    no_scores = gl.zeros([64, ROWS], gl.float32, scores_layout)
    no_dq = gl.zeros([ROWS, WIDTH], gl.float32, wide_layout)
    dk = gl.zeros([64, WIDTH], gl.float32, wide_layout)
    dv = gl.zeros([64, WIDTH], gl.float32, wide_layout)
    copy_stats(stats_tile, 0, entries, begin, end, rows, q_head, num_q_heads, stride_plane, SLOTS, GROUP)
    for number in range(gl.cdiv(end - begin, QUERIES)):
        first = begin + number * QUERIES
        stage = number % 2
        q_tile, do_tile = q_tiles.index(stage), do_tiles.index(stage)
        async_copy.wait_group(0)
        thread_barrier()
        mbarrier.wait(ready.index(stage), (number // 2) % 2)
        scores = warpgroup_mma(key_tile, q_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        dp = warpgroup_mma(value_tile, do_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        copy_stats(
            stats_tile, 1 - stage, entries, first + QUERIES, end, rows, q_head, num_q_heads, stride_plane, SLOTS, GROUP
        )

        scores = warpgroup_mma_wait(1, deps=(scores,))
        p = gl.exp2(scores * scale_log2 - stats_tile.index(stage * 4).load(column_layout)[None, :])
        last_key = stats_tile.index(stage * 4 + 3).load(column_layout).to(gl.int32, bitcast=True) - block * 64
        last_key = gl.where(row_of_column < (end - first) * GROUP, last_key, -1)
        p = gl.where(key[:, None] <= last_key[None, :], p, 0.0)
        p = p * stats_tile.index(stage * 4 + 2).load(column_layout)[None, :]
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do_tile, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = (p * (dp - stats_tile.index(stage * 4 + 1).load(column_layout)[None, :])).to(dtype)
        ds_tile.store(ds)
        fence_async_shared()
        dk = warpgroup_mma(ds_tile, q_tile, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=(dv,))
        dq = warpgroup_mma(ds_tile.permute((1, 0)), key_tile, no_dq, use_acc=False, is_async=True)

        dk, dq = warpgroup_mma_wait(0, deps=(dk, dq))
        largest = gl.maximum(gl.max(gl.abs(dq), 1), 1e-30)
        part = (dq * (1 / largest)[:, None]).to(gl.float16)
        at = first + row // GROUP
        entry = gl.load(entries + gl.minimum(at, end - 1))
        scale_at = dq_scale + (part_base + entry).to(gl.int64) * GROUP + row % GROUP
        gl.store(scale_at, largest * softmax_scale, mask=at < end)
        part_tiles.index(stage).store(part)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(done.index(stage))
    async_copy.wait_group(0)

    column = gl.arange(0, WIDTH, gl.SliceLayout(0, wide_layout))
    page_at = dkv_part + (item.to(gl.int64) * 64 + row[:, None]) * (2 * WIDTH) + column[None, :]
    gl.store(page_at, dk * softmax_scale)
    gl.store(page_at + WIDTH, dv)


@launchable
@gluon.jit(
    do_not_specialize=[
        "num_queries", "num_heads", "num_q_heads", "num_lists", "num_blocks", "head_start", "num_local_pages",
    ]
)  # fmt: skip
def items_kernel(
    q, grad_out, dq_part, k, v, k_remote, v_remote, rows,
    block_table, entries, offsets, item_offsets, item_list,
    dq_scale, dkv_part,
    softmax_scale, scale_log2, num_queries, num_heads, num_q_heads, num_lists, num_blocks, head_start, num_local_pages,
    stride_table, stride_plane,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, WIDTH: gl.constexpr, HAS_REMOTE: gl.constexpr,
    ITEM_QUERIES: gl.constexpr,
):  # fmt: skip
    item = gl.program_id(0)
    if item >= gl.load(item_offsets + num_lists):
        return
    QUERIES: gl.constexpr = ROWS // GROUP
    dtype: gl.constexpr = q.dtype
    head, block, begin, end = place(item, offsets, item_offsets, item_list, num_heads, num_blocks, ITEM_QUERIES)
    kv_head = head_start + head
    q_head = kv_head * GROUP

    # A box is a query's heads times 64 columns; the boxes of a stage are also one swizzled [ROWS, WIDTH] tile.
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BOXES: gl.constexpr = WIDTH // BOX_COLUMNS
    box_shape: gl.constexpr = [2 * BOXES * QUERIES, 1, GROUP, BOX_COLUMNS]
    q_boxes = gl.allocate_shared_memory(dtype, box_shape, q.layout)
    do_boxes = gl.allocate_shared_memory(dtype, box_shape, grad_out.layout)
    part_boxes = q_boxes._reinterpret(gl.float16, box_shape, dq_part.layout)
    q_tiles = q_boxes._reinterpret(dtype, [2, ROWS, WIDTH], tile_layout)
    do_tiles = do_boxes._reinterpret(dtype, [2, ROWS, WIDTH], tile_layout)
    part_tiles = q_boxes._reinterpret(gl.float16, [2, ROWS, WIDTH], tile_layout)
    key_tile = gl.allocate_shared_memory(dtype, [64, WIDTH], tile_layout)
    value_tile = gl.allocate_shared_memory(dtype, [64, WIDTH], tile_layout)
    ds_tile = gl.allocate_shared_memory(dtype, [64, ROWS], tile_layout)
    stats_tile = gl.allocate_shared_memory(gl.float32, [8, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
    fence_async_shared()

    page = gl.load(block_table + kv_head * stride_table + block)
    load_pages(
        key_tile, key_tile, value_tile, k, v, k_remote, v_remote, page, kv_head, num_local_pages,
        stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
        False, HAS_REMOTE,
    )  # fmt: skip

    part_base = head * num_queries * SLOTS
    gl.warp_specialize(
        [
            (_work_on_tiles, (
                item, block, begin, end, q_head, part_base, rows, entries, dq_scale, dkv_part,
                softmax_scale, scale_log2, num_q_heads, stride_plane,
                key_tile, value_tile, ds_tile, q_tiles, do_tiles, part_tiles, stats_tile, ready, done,
                SLOTS, GROUP, WIDTH,
            )),
            (copy_tiles, (
                q, grad_out, dq_part, entries, begin, end, q_head, part_base,
                q_boxes, q_boxes, do_boxes, part_boxes, part_boxes, ready, done,
                SLOTS, GROUP, 2, 0, BOXES, False, False,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
