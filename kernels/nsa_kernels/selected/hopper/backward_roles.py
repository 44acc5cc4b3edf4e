"""Work items of the backward of selected attention on Hopper, for wide keys: as `hopper.backward_items`, in two roles.

dK and a tile's dQ of 192 columns do not fit in one thread's registers beside dV. So four warps make dS and sum up dV,
and four more sum up dK and make dQ, a tile behind:

    S^T = K Q^T     dP^T = V dO^T     dV += P^T dO          P from registers; dS is left in shared memory
    dK += dS^T Q    dQ = dS K

One program on a multiprocessor, 223 KB, four stages of 64 rows of q and dO.

Shapes      Dk = 192, Dv = 128; otherwise what `tiles.hopper_takes`
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

from nsa_kernels.common.hopper import dot, new_barriers, thread_barrier
from nsa_kernels.common.launch import launchable
from nsa_kernels.selected.hopper.backward_items import copy_stats
from nsa_kernels.selected.hopper.pages import BOX_COLUMNS, ROWS, copy_tiles, load_pages, place


@gluon.jit
def _make_scores_grad(
    block, begin, end, q_head, rows, entries, dkv_at, scale_log2, num_q_heads, stride_plane,
    buffers, barriers,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The first role: dS of every tile, and dV of the block in registers."""
    key_tile, key_tail_tile, value_tile, q_tiles, q_tail_tiles, do_tiles, _parts, _part_tails, ds_tiles, stats = buffers
    ready, done, ds_full, ds_free = barriers
    QUERIES: gl.constexpr = ROWS // GROUP
    DV: gl.constexpr = value_tile.shape[1]
    DK: gl.constexpr = key_tile.shape[1] + key_tail_tile.shape[1]
    dtype: gl.constexpr = key_tile.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide_layout, 2)
    column_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    key = gl.arange(0, 64, gl.SliceLayout(1, scores_layout))
    row_of_column = gl.arange(0, ROWS, column_layout)
    no_scores = gl.zeros([64, ROWS], gl.float32, scores_layout)
    dv = gl.zeros([64, DV], gl.float32, wide_layout)
    copy_stats(stats, 0, entries, begin, end, rows, q_head, num_q_heads, stride_plane, SLOTS, GROUP)
    for number in range(gl.cdiv(end - begin, QUERIES)):
        first = begin + number * QUERIES
        stage, turn = number % STAGES, number % 2
        do_tile = do_tiles.index(stage)
        async_copy.wait_group(0)
        thread_barrier()
        mbarrier.wait(ready.index(stage), (number // STAGES) % 2)
        scores = dot(key_tile, key_tail_tile, q_tiles.index(stage), q_tail_tiles.index(stage), no_scores, True)
        dp = warpgroup_mma(value_tile, do_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        following = first + QUERIES
        copy_stats(stats, 1 - turn, entries, following, end, rows, q_head, num_q_heads, stride_plane, SLOTS, GROUP)

        scores = warpgroup_mma_wait(1, deps=(scores,))
        p = gl.exp2(scores * scale_log2 - stats.index(turn * 4).load(column_layout)[None, :])
        last_key = stats.index(turn * 4 + 3).load(column_layout).to(gl.int32, bitcast=True) - block * 64
        last_key = gl.where(row_of_column < (end - first) * GROUP, last_key, -1)
        p = gl.where(key[:, None] <= last_key[None, :], p, 0.0)
        p = p * stats.index(turn * 4 + 2).load(column_layout)[None, :]
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do_tile, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = (p * (dp - stats.index(turn * 4 + 1).load(column_layout)[None, :])).to(dtype)
        mbarrier.wait(ds_free.index(turn), (number // 2 & 1) ^ 1)
        ds_tiles.index(turn).store(ds)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(ds_full.index(turn))
        dv = warpgroup_mma_wait(0, deps=(dv,))
        mbarrier.arrive(done.index(stage))
    async_copy.wait_group(0)

    row = gl.arange(0, 64, gl.SliceLayout(1, wide_layout))
    column = gl.arange(0, DV, gl.SliceLayout(0, wide_layout))
    gl.store(dkv_at + row[:, None] * (DK + DV) + (DK + column)[None, :], dv)


@gluon.jit
def _sum_up(
    begin, end, part_base, entries, dq_scale, dkv_at, softmax_scale, buffers, barriers,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The second role: dK of the block in registers, a part of dQ for every tile."""
    key_tile, key_tail_tile, value_tile, q_tiles, q_tail_tiles, _do, part_tiles, part_tail_tiles, ds_tiles, _st = (
        buffers
    )
    ready, done, ds_full, ds_free = barriers
    QUERIES: gl.constexpr = ROWS // GROUP
    WIDTH: gl.constexpr = key_tile.shape[1]
    REST: gl.constexpr = key_tail_tile.shape[1]
    STRIDE: gl.constexpr = WIDTH + REST + value_tile.shape[1]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    tail: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    dk = gl.zeros([64, WIDTH], gl.float32, wide)
    dk_tail = gl.zeros([64, REST], gl.float32, tail)
    no_dq = gl.zeros([ROWS, WIDTH], gl.float32, wide)
    no_dq_tail = gl.zeros([ROWS, REST], gl.float32, tail)
    for number in range(gl.cdiv(end - begin, QUERIES)):
        stage, turn = number % STAGES, number % 2
        mbarrier.wait(ready.index(stage), (number // STAGES) % 2)
        mbarrier.wait(ds_full.index(turn), number // 2 & 1)
        ds = ds_tiles.index(turn)
        dq = warpgroup_mma(ds.permute((1, 0)), key_tile, no_dq, use_acc=False, is_async=True)
        dq_tail = warpgroup_mma(ds.permute((1, 0)), key_tail_tile, no_dq_tail, use_acc=False, is_async=True)
        dk = warpgroup_mma(ds, q_tiles.index(stage), dk, is_async=True)
        dk_tail = warpgroup_mma(ds, q_tail_tiles.index(stage), dk_tail, is_async=True)
        dq, dq_tail, dk, dk_tail = warpgroup_mma_wait(0, deps=(dq, dq_tail, dk, dk_tail))
        mbarrier.arrive(ds_free.index(turn))

        largest = gl.convert_layout(gl.max(gl.abs(dq_tail), 1), row.type.layout, assert_trivial=True)
        largest = gl.maximum(gl.maximum(gl.max(gl.abs(dq), 1), largest), 1e-30)
        at = begin + number * QUERIES + row // GROUP
        entry = gl.load(entries + gl.minimum(at, end - 1))
        scale_at = dq_scale + (part_base + entry).to(gl.int64) * GROUP + row % GROUP
        gl.store(scale_at, largest * softmax_scale, mask=at < end)
        factor = 1 / largest
        part_tiles.index(stage).store((dq * factor[:, None]).to(gl.float16))
        factor = gl.convert_layout(factor, gl.SliceLayout(1, tail), assert_trivial=True)
        part_tail_tiles.index(stage).store((dq_tail * factor[:, None]).to(gl.float16))
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(done.index(stage))

    column = gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
    gl.store(dkv_at + row[:, None] * STRIDE + column[None, :], dk * softmax_scale)
    row = gl.arange(0, 64, gl.SliceLayout(1, tail))
    column = gl.arange(0, REST, gl.SliceLayout(0, tail))
    gl.store(dkv_at + row[:, None] * STRIDE + (WIDTH + column)[None, :], dk_tail * softmax_scale)


@launchable
@gluon.jit(
    do_not_specialize=[
        "num_queries", "num_heads", "num_q_heads", "num_lists", "num_blocks", "head_start", "num_local_pages",
    ]
)  # fmt: skip
def roles_kernel(
    q, grad_out, dq_part, k, v, k_remote, v_remote, rows,
    block_table, entries, offsets, item_offsets, item_list,
    dq_scale, dkv_part,
    softmax_scale, scale_log2, num_queries, num_heads, num_q_heads, num_lists, num_blocks, head_start, num_local_pages,
    stride_table, stride_plane,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, HAS_REMOTE: gl.constexpr, ITEM_QUERIES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    item = gl.program_id(0)
    if item >= gl.load(item_offsets + num_lists):
        return
    QUERIES: gl.constexpr = ROWS // GROUP
    dtype: gl.constexpr = q.dtype
    head, block, begin, end = place(item, offsets, item_offsets, item_list, num_heads, num_blocks, ITEM_QUERIES)
    kv_head = head_start + head
    q_head = kv_head * GROUP

    # A box is a query's heads times 64 columns; the boxes of a stage are also swizzled tiles of 128 and of 64 columns.
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    box_shape: gl.constexpr = [STAGES * 2 * QUERIES, 1, GROUP, BOX_COLUMNS]
    tail_shape: gl.constexpr = [STAGES * QUERIES, 1, GROUP, BOX_COLUMNS]
    q_boxes = gl.allocate_shared_memory(dtype, box_shape, q.layout)
    q_tail_boxes = gl.allocate_shared_memory(dtype, tail_shape, q.layout)
    do_boxes = gl.allocate_shared_memory(dtype, box_shape, grad_out.layout)
    part_boxes = q_boxes._reinterpret(gl.float16, box_shape, dq_part.layout)
    part_tail_boxes = q_tail_boxes._reinterpret(gl.float16, tail_shape, dq_part.layout)
    key_tile = gl.allocate_shared_memory(dtype, [64, 2 * BOX_COLUMNS], tile_layout)
    key_tail_tile = gl.allocate_shared_memory(dtype, [64, BOX_COLUMNS], tile_layout)
    value_tile = gl.allocate_shared_memory(dtype, [64, 2 * BOX_COLUMNS], tile_layout)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, 64, ROWS], tile_layout)
    stats = gl.allocate_shared_memory(gl.float32, [8, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffers = (
        key_tile, key_tail_tile, value_tile,
        q_boxes._reinterpret(dtype, [STAGES, ROWS, 2 * BOX_COLUMNS], tile_layout),
        q_tail_boxes._reinterpret(dtype, [STAGES, ROWS, BOX_COLUMNS], tile_layout),
        do_boxes._reinterpret(dtype, [STAGES, ROWS, 2 * BOX_COLUMNS], tile_layout),
        q_boxes._reinterpret(gl.float16, [STAGES, ROWS, 2 * BOX_COLUMNS], tile_layout),
        q_tail_boxes._reinterpret(gl.float16, [STAGES, ROWS, BOX_COLUMNS], tile_layout),
        ds_tiles, stats,
    )  # fmt: skip
    ready, done = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    barriers = (ready, done, new_barriers(2, 1), new_barriers(2, 1))
    fence_async_shared()

    page = gl.load(block_table + kv_head * stride_table + block)
    load_pages(
        key_tile, key_tail_tile, value_tile, k, v, k_remote, v_remote, page, kv_head, num_local_pages,
        stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
        True, HAS_REMOTE,
    )  # fmt: skip

    part_base = head * num_queries * SLOTS
    dkv_at = dkv_part + item.to(gl.int64) * (64 * 5 * BOX_COLUMNS)
    gl.warp_specialize(
        [
            (_make_scores_grad, (
                block, begin, end, q_head, rows, entries, dkv_at, scale_log2, num_q_heads, stride_plane,
                buffers, barriers,
                SLOTS, GROUP, STAGES,
            )),
            (_sum_up, (
                begin, end, part_base, entries, dq_scale, dkv_at, softmax_scale, buffers, barriers,
                GROUP, STAGES,
            )),
            (copy_tiles, (
                q, grad_out, dq_part, entries, begin, end, q_head, part_base,
                q_boxes, q_tail_boxes, do_boxes, part_boxes, part_tail_boxes, ready, done,
                SLOTS, GROUP, STAGES, 0, 2, True, True,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
