"""The rest of the forward of selected attention on Hopper GPUs: shared blocks and the sum of parts, in one kernel.

A tile of consecutive queries attends to the blocks its neighbours choose too (first, own, the one before), as the
`shared` kernel of `forward` does, while the copying warp already brings the tile's parts, slot after slot. The
shared blocks' result never leaves the registers: the parts are added to it there.
Two programs share a multiprocessor: 101 KB (Dk 128, three stages of parts; Dk 192, two) and half the registers each.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.common.hopper import descriptor, dot, thread_barrier
from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.selected.hopper.pages import BOX_COLUMNS, ROWS, boxes, load_pages
from nsa_kernels.selected.pages import page_strides

NO_BLOCK = gl.constexpr(2**30)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _count_parts(ids, own, slot):
    """How many of a row's slots went through the index: those after the first that come before the last two blocks."""
    return gl.sum(((slot > 0) & (ids >= 0) & (ids < own - 1)).to(gl.int32), 1)


@gluon.jit
def _load_ids(
    block_indices, position, t, live, kv_head, stride_bt, stride_bh, stride_bn,
    SLOTS: gl.constexpr, SLOTS_P2: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Block ids [rows, SLOTS_P2] and positions of queries t [rows], -1 where there is none."""
    slot = gl.arange(0, SLOTS_P2, gl.SliceLayout(0, layout))[None, :]
    at = block_indices + t.to(gl.int64) * stride_bt + kv_head * stride_bh
    ids = gl.load(at[:, None] + slot * stride_bn, mask=live[:, None] & (slot < SLOTS), other=-1)
    pos = gl.load(position + t, mask=live, other=-1).to(gl.int32)
    return ids, pos, slot


@gluon.jit
def _copy_parts(
    q, part, block_indices, position, first, head, kv_head, num_queries, stride_bt, stride_bh, stride_bn,
    q_boxes, q_tail_boxes, part_boxes, q_ready, ready, free,
    SLOTS: gl.constexpr, SLOTS_P2: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    BOXES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The copying warp: the tile's queries, then its parts, slot after slot."""
    QUERIES: gl.constexpr = ROWS // GROUP
    mbarrier.expect(q_ready, 2 * ROWS * BOX_COLUMNS * (BOXES + (1 if TAIL else 0)))
    for piece in gl.static_range(BOXES):
        for i in gl.static_range(QUERIES):
            at = [first + i, kv_head * GROUP, piece * BOX_COLUMNS]
            tma.async_copy_global_to_shared(q, at, q_ready, q_boxes.index(piece * QUERIES + i))
    if TAIL:
        for i in gl.static_range(QUERIES):
            rest = [first + i, kv_head * GROUP, BOXES * BOX_COLUMNS]
            tma.async_copy_global_to_shared(q, rest, q_ready, q_tail_boxes.index(i))
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // SLOTS_P2, SLOTS_P2], [1, 1], [1, 0])
    t = first + gl.arange(0, QUERIES, gl.SliceLayout(1, layout))
    ids, pos, slot = _load_ids(
        block_indices, position, t, t < num_queries, kv_head, stride_bt, stride_bh, stride_bn,
        SLOTS, SLOTS_P2, layout,
    )  # fmt: skip
    own = gl.where(pos >= 0, pos // 64, -1)
    parts = gl.max(_count_parts(ids, own[:, None], slot), 0)
    for number in range(parts):
        stage = number % STAGES
        mbarrier.wait(free.index(stage), (number // STAGES - 1) % 2, pred=number >= STAGES)
        mbarrier.expect(ready.index(stage), 2 * ROWS * BOX_COLUMNS * BOXES)
        for piece in gl.static_range(BOXES):
            box = [head * num_queries + first, number + 1, 0, piece * BOX_COLUMNS]
            tma.async_copy_global_to_shared(part, box, ready.index(stage), part_boxes.index(stage * BOXES + piece))


@gluon.jit
def _attend_and_add(
    k, v, k_remote, v_remote, block_table, block_indices, position, scale, part_lse, out, lse,
    scale_log2, first, head, kv_head, num_queries, num_local_pages, stride_table,
    stride_bt, stride_bh, stride_bn, stride_lt,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    q_tile, q_tail_tile, out_boxes, key_tile, key_tail_tile, value_tile, part_tiles, weights, q_ready, ready, free,
    SLOTS: gl.constexpr, SLOTS_P2: gl.constexpr, GROUP: gl.constexpr,
    HAS_REMOTE: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The warps with the tensor cores: the shared blocks, every part's weight, the sum."""
    QUERIES: gl.constexpr = ROWS // GROUP
    WIDTH: gl.constexpr = value_tile.shape[1]
    BOXES: gl.constexpr = WIDTH // BOX_COLUMNS
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide_layout, 2)
    score_row: gl.constexpr = gl.SliceLayout(1, scores_layout)
    wide_row: gl.constexpr = gl.SliceLayout(1, wide_layout)
    ids_layout: gl.constexpr = gl.BlockedLayout([1, SLOTS_P2], [32, 1], [4, 1], [1, 0])

    # A row's candidates, NO_BLOCK for those it did not choose: its first block, the one before its own, and its own.
    row = gl.arange(0, ROWS, gl.SliceLayout(1, ids_layout))
    t = first + row // GROUP
    live = t < num_queries
    ids, pos, slot = _load_ids(
        block_indices, position, t, live, kv_head, stride_bt, stride_bh, stride_bn, SLOTS, SLOTS_P2, ids_layout
    )
    own = gl.where(pos >= 0, pos // 64, -1)
    parts = gl.max(_count_parts(ids, own[:, None], slot), 0)
    part_row = ((head * num_queries + t).to(gl.int64) * SLOTS)[:, None] * GROUP + (row % GROUP)[:, None] + slot * GROUP
    gathered = live[:, None] & (slot > 0) & (ids >= 0) & (ids < (own - 1)[:, None])
    lses = gl.load(part_lse + part_row, mask=gathered, other=float("-inf"))
    scales = gl.load(scale + part_row, mask=gathered, other=0.0)
    first_block = gl.max(gl.where(slot == 0, ids, -1), 1)
    first_block = gl.where((first_block >= 0) & (first_block <= own), first_block, NO_BLOCK)
    before = gl.max((ids == (own - 1)[:, None]).to(gl.int32), 1) > 0
    before = gl.where(before & (own > 0), own - 1, NO_BLOCK)
    last = gl.max((ids == own[:, None]).to(gl.int32), 1) > 0
    last = gl.where(last & (own >= 0), own, NO_BLOCK)
    first_block = gl.convert_layout(first_block, score_row)
    before = gl.convert_layout(before, score_row)
    last = gl.convert_layout(last, score_row)
    pos = gl.convert_layout(pos, score_row)

    # --- blocks attended to in place, ascending; a block that a row did not choose changes nothing in it
    key = gl.arange(0, 64, gl.SliceLayout(0, scores_layout))
    no_scores = gl.zeros([ROWS, 64], gl.float32, scores_layout)
    top = gl.full([ROWS], float("-inf"), gl.float32, score_row)
    total = gl.zeros([ROWS], gl.float32, score_row)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, wide_layout)
    mbarrier.wait(q_ready, 0)
    block = gl.min(gl.minimum(gl.minimum(first_block, before), last), 0)
    while block < NO_BLOCK:
        page = gl.load(block_table + kv_head * stride_table + block)
        load_pages(
            key_tile, key_tail_tile, value_tile, k, v, k_remote, v_remote, page, kv_head, num_local_pages,
            stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
            TAIL, HAS_REMOTE,
        )  # fmt: skip
        scores = dot(q_tile, q_tail_tile, key_tile, key_tail_tile, no_scores, TAIL)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        # The last key that each row sees here; -1 where the row did not choose the block.
        chosen = (first_block == block) | (before == block) | (last == block)
        last_key = gl.where(chosen, pos - block * 64, -1)
        scores = gl.where(key[None, :] <= last_key[:, None], scores * scale_log2, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, 1))
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(scores - base[:, None])
        keep = gl.exp2(top - base)
        total = total * keep + gl.sum(p, 1)
        acc = acc * gl.convert_layout(keep, wide_row, assert_trivial=True)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(q_tile.dtype), operand), value_tile, acc)
        top = new_top
        first_block = gl.where(first_block == block, NO_BLOCK, first_block)
        before = gl.where(before == block, NO_BLOCK, before)
        last = gl.where(last == block, NO_BLOCK, last)
        block = gl.min(gl.minimum(gl.minimum(first_block, before), last), 0)

    # --- every part's weight; a row's first block is among those above, so a row without them sees nothing
    shared_lse = gl.where(total > 0, top + gl.log2(gl.where(total > 0, total, 1.0)), float("-inf"))
    shared_lse = gl.convert_layout(shared_lse, gl.SliceLayout(1, ids_layout))
    base = gl.maximum(shared_lse, gl.max(lses, 1))
    base = gl.where(base == float("-inf"), 0.0, base)
    whole = gl.exp2(shared_lse - base) + gl.sum(gl.exp2(lses - base[:, None]), 1)
    result = base + gl.log2(gl.where(whole > 0, whole, 1.0))
    weight_rows = weights._reinterpret(gl.float32, [SLOTS_P2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    weight_rows.store(gl.permute(scales * gl.exp2(lses - result[:, None]), (1, 0)))
    at = lse + t.to(gl.int64) * stride_lt + kv_head * GROUP + row % GROUP
    gl.store(at, gl.where(whole > 0, result * LN2, float("-inf")), mask=live)
    result = gl.convert_layout(result, score_row)
    share = gl.where(total > 0, gl.exp2(top - result), 0.0)
    acc = acc * gl.convert_layout(share, wide_row, assert_trivial=True)[:, None]

    # --- the sum
    for number in range(parts):
        stage = number % STAGES
        weight = weights.index(number + 1).load(wide_row)
        mbarrier.wait(ready.index(stage), (number // STAGES) % 2)
        x = part_tiles.index(stage).load(wide_layout).to(gl.float32)
        acc += gl.where((weight != 0)[:, None], x, 0.0) * weight[:, None]
        # A barrier lets loads pass that are only under way: without the fence the next part can overtake them.
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(free.index(stage))
    q_tile.store(acc.to(q_tile.dtype))  # the result leaves from where the queries came in
    fence_async_shared()
    thread_barrier()
    for piece in gl.static_range(BOXES):
        for i in gl.static_range(QUERIES):
            at = [first + i, kv_head * GROUP, piece * BOX_COLUMNS]
            tma.async_copy_shared_to_global(out, at, out_boxes.index(piece * QUERIES + i))
    tma.store_wait(0)


@launchable
@gluon.jit(do_not_specialize=["num_queries", "head_start", "num_local_pages"])
def _shared_and_sum_kernel(
    q, part, out, k, v, k_remote, v_remote, block_table, block_indices, position,
    scale, part_lse, lse,
    scale_log2, num_queries, head_start, num_local_pages, stride_table,
    stride_bt, stride_bh, stride_bn, stride_lt,
    stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
    SLOTS: gl.constexpr, SLOTS_P2: gl.constexpr, GROUP: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr,
    HAS_REMOTE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    QUERIES: gl.constexpr = ROWS // GROUP
    BOXES: gl.constexpr = WIDTH // BOX_COLUMNS
    first, head = gl.program_id(0) * QUERIES, gl.program_id(1)
    kv_head = head_start + head
    dtype: gl.constexpr = q.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_boxes = gl.allocate_shared_memory(dtype, [BOXES * QUERIES, 1, GROUP, BOX_COLUMNS], q.layout)
    out_boxes = q_boxes._reinterpret(dtype, [BOXES * QUERIES, 1, GROUP, BOX_COLUMNS], out.layout)
    q_tile = q_boxes._reinterpret(dtype, [ROWS, WIDTH], tile_layout)
    part_boxes = gl.allocate_shared_memory(gl.float16, [STAGES * BOXES, QUERIES, 1, GROUP, BOX_COLUMNS], part.layout)
    part_tiles = part_boxes._reinterpret(gl.float16, [STAGES, ROWS, WIDTH], tile_layout)
    key_tile = gl.allocate_shared_memory(dtype, [64, WIDTH], tile_layout)
    q_tail_boxes, q_tail_tile, key_tail_tile = q_boxes, q_tile, key_tile  # not read without a tail
    if TAIL:
        q_tail_boxes = gl.allocate_shared_memory(dtype, [QUERIES, 1, GROUP, BOX_COLUMNS], q.layout)
        q_tail_tile = q_tail_boxes._reinterpret(dtype, [ROWS, BOX_COLUMNS], tile_layout)
        key_tail_tile = gl.allocate_shared_memory(dtype, [64, BOX_COLUMNS], tile_layout)
    value_tile = gl.allocate_shared_memory(dtype, [64, WIDTH], tile_layout)
    weights = gl.allocate_shared_memory(gl.float32, [SLOTS_P2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend_and_add, (
                k, v, k_remote, v_remote, block_table, block_indices, position, scale, part_lse, out, lse,
                scale_log2, first, head, kv_head, num_queries, num_local_pages, stride_table,
                stride_bt, stride_bh, stride_bn, stride_lt,
                stride_kr, stride_kh, stride_kp, stride_kpr, stride_vr, stride_vh, stride_vp, stride_vpr,
                q_tile, q_tail_tile, out_boxes, key_tile, key_tail_tile, value_tile, part_tiles, weights,
                q_ready, ready, free,
                SLOTS, SLOTS_P2, GROUP, HAS_REMOTE, STAGES, TAIL,
            )),
            (_copy_parts, (
                q, part, block_indices, position, first, head, kv_head, num_queries, stride_bt, stride_bh, stride_bn,
                q_boxes, q_tail_boxes, part_boxes, q_ready, ready, free,
                SLOTS, SLOTS_P2, GROUP, STAGES, BOXES, TAIL,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


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
    """As `forward_shared.attend_shared_and_sum`, for what `tiles.hopper_takes`."""
    num_heads, num_queries, num_slots, group, dim_v = part.shape
    tail = q.shape[2] > dim_v
    queries = ROWS.value // group
    parts = descriptor(part.view(-1, *part.shape[2:]), (queries, 1, group, BOX_COLUMNS.value))
    _shared_and_sum_kernel[(cdiv(num_queries, queries), num_heads)](
        boxes(q, group), parts, boxes(out, group), k, v, k_remote, v_remote, block_table, block_indices, position,
        scale, part_lse, lse,
        scale_log2, num_queries, head_start, k.shape[0] // slc_block_len, block_table.stride(0),
        *block_indices.stride(), lse.stride(0), *page_strides(k, k_remote), *page_strides(v, v_remote),
        SLOTS=num_slots, SLOTS_P2=next_power_of_2(num_slots), GROUP=group, WIDTH=dim_v,
        TAIL=tail, HAS_REMOTE=k_remote is not None, STAGES=2 if tail else 3,
        num_warps=4, maxnreg=128,
    )  # fmt: skip
