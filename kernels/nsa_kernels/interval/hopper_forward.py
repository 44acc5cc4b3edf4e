"""Compressed attention on Hopper, in Gluon: `cmp_forward`'s forward with the roles of warps apart.

Every multiprocessor takes tiles of 128 rows in turn. One warp copies them and their keys and values in; two groups of
four warps own 64 rows each, and while the products P V of one key tile run, compute the softmax of the next:

    issue S[i + 1] = Q K[i + 1]^T;   issue O += P[i] V[i];   P[i + 1] = softmax(S[i + 1]);   O *= alpha

Shapes      as `cmp_forward`; Dk of 64, 128 or 192, Dv of 64 or 128, 64 a multiple of G, 16-bit inputs
Numerics    as `cmp_forward`, with key tiles of BLOCK_N: the bits of a row depend on the row and its keys alone
Source      Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3), section 3.2
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

from nsa_kernels.common.device import num_multiprocessors
from nsa_kernels.common.hopper import ceil_div, copy_rows, descriptor, descriptors, dot, new_barriers, tile
from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import split_head_dim
from nsa_kernels.interval.tiles import SPAN_QUERIES, num_tiles

GROUP_ROWS = gl.constexpr(64)  # rows of four warps
BLOCK_M = gl.constexpr(128)
SPAN = gl.constexpr(SPAN_QUERIES)
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


@launchable
@gluon.jit
def _forward_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, out_desc, begin_ptr, end_ptr, unseen_ptr, spans_ptr, lse_ptr,
    num_rows, num_heads_kv, num_items, softmax_scale,
    SLOTS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BLOCK_N: gl.constexpr,
    G: gl.constexpr, DK: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = q_desc.layout
    q_smem = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_ROWS // G, G, DK], LAYOUT)
    k_smem = gl.allocate_shared_memory(dtype, [K_STAGES, BLOCK_N, 1, DK], LAYOUT)
    q_tail_smem, k_tail_smem = q_smem, k_smem  # not read where there is no tail
    if DK_TAIL > 0:
        q_tail_smem = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_ROWS // G, G, DK_TAIL], LAYOUT)
        k_tail_smem = gl.allocate_shared_memory(dtype, [K_STAGES, BLOCK_N, 1, DK_TAIL], LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [V_STAGES, BLOCK_N, 1, DV], LAYOUT)
    out_smem = gl.allocate_shared_memory(dtype, [2, GROUP_ROWS // G, G, DV], LAYOUT)
    q_full = new_barriers(SLOTS, 1)
    q_empty = new_barriers(SLOTS, 2)
    k_full = new_barriers(K_STAGES, 1)
    k_empty = new_barriers(K_STAGES, 2)
    v_full = new_barriers(V_STAGES, 1)
    v_empty = new_barriers(V_STAGES, 2)

    buffers = (q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, out_smem)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    queries = (begin_ptr, end_ptr, spans_ptr)
    sizes = (num_rows, num_heads_kv, num_items)
    gl.warp_specialize(
        [
            (_attend, (0, buffers, barriers, out_desc, queries, unseen_ptr, lse_ptr, sizes, softmax_scale)),
            (_attend, (1, buffers, barriers, out_desc, queries, unseen_ptr, lse_ptr, sizes, softmax_scale)),
            (_copy, (q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, buffers, barriers, queries, sizes)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def place(item, queries, sizes, G: gl.constexpr, BLOCK_N: gl.constexpr):
    """Head and first row of an item, and its key tiles: the first key, how many, and the keys that all rows see.

    The last rows see most keys: they come first. As begin and end do not decrease, those of the first and the last
    query bound the others. With spans (`tiles.SPAN` queries each) items are the tiles of those alone.
    """
    begin_ptr, end_ptr, spans_ptr = queries
    num_rows, num_heads_kv, num_items = sizes
    head = item % num_heads_kv
    row = (num_items - 1 - item) // num_heads_kv * BLOCK_M
    if spans_ptr is not None:
        TILES: gl.constexpr = SPAN * G // BLOCK_M
        which = row // BLOCK_M
        row = gl.load(spans_ptr + which // TILES) * G + which % TILES * BLOCK_M
    first_query = row // G
    last_query = gl.minimum(row + BLOCK_M, num_rows) // G - 1
    begin = gl.load(begin_ptr + first_query)
    all_begun = gl.load(begin_ptr + last_query)
    none_ended = gl.load(end_ptr + first_query)
    end = gl.load(end_ptr + last_query)
    first_key = begin // BLOCK_N * BLOCK_N
    num_tiles = gl.where(begin < end, ceil_div(end - first_key, BLOCK_N), 0)
    return head, row, first_key, num_tiles, all_begun, none_ended


@gluon.jit
def _copy(q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, buffers, barriers, queries, sizes):
    """Queries of each item, and keys and values of each of its tiles."""
    q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, _out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    SLOTS: gl.constexpr = q_full.shape[0]
    K_STAGES: gl.constexpr = k_smem.shape[0]
    V_STAGES: gl.constexpr = v_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    G: gl.constexpr = q_smem.shape[2]
    Q_TAIL_BYTES: gl.constexpr = 0 if q_tail_desc is None else q_tail_desc.block_type.nbytes
    K_TAIL_BYTES: gl.constexpr = 0 if k_tail_desc is None else k_tail_desc.block_type.nbytes
    step = 0
    for item in range(gl.program_id(0), sizes[2], gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        head, row, first_key, num_tiles, _begun, _ended = place(item, queries, sizes, G, BLOCK_N)
        slot = turn % SLOTS
        mbarrier.wait(q_empty.index(slot), (turn // SLOTS & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), 2 * (q_desc.block_type.nbytes + Q_TAIL_BYTES))
        for half in gl.static_range(2):
            at = (row + half * GROUP_ROWS) // G
            copy_rows(q_desc, q_tail_desc, at, head * G, q_full.index(slot), q_smem, q_tail_smem, slot * 2 + half)
        for i in range(num_tiles):
            key = first_key + i * BLOCK_N
            stage = step % K_STAGES
            ready = k_full.index(stage)
            mbarrier.wait(k_empty.index(stage), (step // K_STAGES & 1) ^ 1)
            mbarrier.expect(ready, k_desc.block_type.nbytes + K_TAIL_BYTES)
            copy_rows(k_desc, k_tail_desc, key, head, ready, k_smem, k_tail_smem, stage)
            stage = step % V_STAGES
            mbarrier.wait(v_empty.index(stage), (step // V_STAGES & 1) ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [key, head, 0], v_full.index(stage), v_smem.index(stage))
            step += 1


@gluon.jit
def _probabilities(s, top, total, scale, key, begin, end, masked):
    """P of one key tile, the factor by which what was summed before shrinks, and the new top and total."""
    ROWS: gl.constexpr = top.type.layout
    if masked:
        column = gl.expand_dims(key + gl.arange(0, s.shape[1], gl.SliceLayout(0, ROWS.parent)), 0)
        s = gl.where((column >= gl.expand_dims(begin, 1)) & (column < gl.expand_dims(end, 1)), s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1))
    base = gl.where(new_top == float("-inf"), 0.0, new_top)  # a row without a key yet: exp2(-inf - 0)
    p = gl.exp2(gl.fma(s, scale, -gl.expand_dims(base * scale, 1)))
    alpha = gl.exp2((top - base) * scale)  # exactly 1 where a row sees no key of the tile: its bits stay
    return p, alpha, new_top, total * alpha + gl.sum(p, 1)


@gluon.jit
def blank_unseen(v, key, lowest, highest, unseen_ptr):
    """Rows of `v` outside of [lowest, highest) become 0 in a tile with rows that no query sees: they may hold NaN."""
    if unseen_ptr is not None:
        BLOCK_N: gl.constexpr = v.shape[0]
        if (key < lowest) | (key + BLOCK_N > highest):  # noqa: SIM102
            if gl.load(unseen_ptr + key // BLOCK_N) != 0:
                LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
                row = gl.expand_dims(key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT)), 1)
                values = v.load(LAYOUT)
                v.store(gl.where((row >= lowest) & (row < highest), values, 0.0).to(v.dtype))
                fence_async_shared()


@gluon.jit
def _attend(WHICH: gl.constexpr, buffers, barriers, out_desc, queries, unseen_ptr, lse_ptr, sizes, softmax_scale):
    """out and lse of GROUP_ROWS rows of every item."""
    q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    begin_ptr, end_ptr, _spans_ptr = queries
    num_rows, num_heads_kv, num_items = sizes
    SLOTS: gl.constexpr = q_full.shape[0]
    K_STAGES: gl.constexpr = k_smem.shape[0]
    V_STAGES: gl.constexpr = v_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    G: gl.constexpr = q_smem.shape[2]
    DV: gl.constexpr = v_smem.shape[3]
    dtype: gl.constexpr = q_smem.dtype
    TAIL: gl.constexpr = q_tail_smem.shape[3] < q_smem.shape[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    nothing = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, SCORES)
    out = out_smem.index(WHICH).reshape([GROUP_ROWS, DV])
    scale = softmax_scale * LOG2_E
    step = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        head, first_row, first_key, num_tiles, all_begun, none_ended = place(item, queries, sizes, G, BLOCK_N)
        row = first_row + WHICH * GROUP_ROWS + gl.arange(0, GROUP_ROWS, ROWS)
        query = gl.minimum(row, num_rows - 1) // G
        begin = gl.load(begin_ptr + query)
        end = gl.load(end_ptr + query)
        top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, ROWS)  # the largest score so far, before scaling
        total = gl.zeros([GROUP_ROWS], gl.float32, ROWS)
        acc = gl.zeros([GROUP_ROWS, DV], gl.float32, SUMS)

        lowest = gl.load(begin_ptr + first_row // G)
        highest = gl.load(end_ptr + gl.minimum(first_row + BLOCK_M, num_rows) // G - 1)
        slot = turn % SLOTS
        q = tile(q_smem, slot * 2 + WHICH, GROUP_ROWS)
        q_tail = tile(q_tail_smem, slot * 2 + WHICH, GROUP_ROWS)
        mbarrier.wait(q_full.index(slot), turn // SLOTS & 1)
        if num_tiles > 0:
            stage = step % K_STAGES
            mbarrier.wait(k_full.index(stage), step // K_STAGES & 1)
            s = dot(q, q_tail, tile(k_smem, stage, BLOCK_N), tile(k_tail_smem, stage, BLOCK_N), nothing, TAIL)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage))
            masked = (first_key < all_begun) | (first_key + BLOCK_N > none_ended)
            p, alpha, top, total = _probabilities(s, top, total, scale, first_key, begin, end, masked)
            p = gl.convert_layout(p.to(dtype), OPERAND)
            for i in range(1, num_tiles):
                last = step % V_STAGES
                last_phase = step // V_STAGES & 1
                step += 1
                stage = step % K_STAGES
                key = first_key + i * BLOCK_N
                v = tile(v_smem, last, BLOCK_N)
                mbarrier.wait(k_full.index(stage), step // K_STAGES & 1)
                s = dot(q, q_tail, tile(k_smem, stage, BLOCK_N), tile(k_tail_smem, stage, BLOCK_N), nothing, TAIL)
                mbarrier.wait(v_full.index(last), last_phase)
                blank_unseen(v, key - BLOCK_N, lowest, highest, unseen_ptr)
                product = warpgroup_mma(p, v, acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(stage))
                masked = (key < all_begun) | (key + BLOCK_N > none_ended)
                next_p, alpha, top, total = _probabilities(s, top, total, scale, key, begin, end, masked)
                acc = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(v_empty.index(last))
                acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, SUMS)), 1)
                p = gl.convert_layout(next_p.to(dtype), OPERAND)
            mbarrier.arrive(q_empty.index(slot))
            stage = step % V_STAGES
            mbarrier.wait(v_full.index(stage), step // V_STAGES & 1)
            v = tile(v_smem, stage, BLOCK_N)
            blank_unseen(v, first_key + (num_tiles - 1) * BLOCK_N, lowest, highest, unseen_ptr)
            product = warpgroup_mma(p, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(v_empty.index(stage))
            step += 1
        else:
            mbarrier.arrive(q_empty.index(slot))

        seen = total > 0
        norm = gl.convert_layout(1.0 / gl.where(seen, total, 1.0), gl.SliceLayout(1, SUMS))
        tma.store_wait(0)
        out.store((acc * gl.expand_dims(norm, 1)).to(dtype))
        fence_async_shared()
        at = (first_row + WHICH * GROUP_ROWS) // G
        tma.async_copy_shared_to_global(out_desc, [at, head * G, 0], out_smem.index(WHICH))
        lse = gl.where(seen, (top * scale + gl.log2(total)) * LN_2, float("-inf"))
        lse_at = (row // G).to(gl.int64) * (num_heads_kv * G) + head * G + row % G
        gl.store(lse_ptr + lse_at, lse, mask=row < num_rows)
    tma.store_wait(0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    *,
    key_tile: int = 128,
    unseen: Tensor | None = None,
    spans: Tensor | None = None,
) -> None:
    """Writes out [T, Hq, D] and lse [T, Hq], both contiguous; of the queries of the `spans` only, if there are any.

    H200, bf16, 65,536 tokens, D 128, Hq 64, Hkv 4: 6.5 ms (674 TFLOP/s) alone, 7.5 sustained at the card's power limit,
    where the kernel of `cmp_forward` takes 8.6 and 9.3; 8,192 tokens: 0.19 and 0.26.
    """
    num_queries, num_q_heads, dim_k = q.shape
    num_kv_heads, dim_v = v.shape[1:]
    group = num_q_heads // num_kv_heads
    num_items = num_tiles(num_queries, spans, group, BLOCK_M.value) * num_kv_heads
    buffers = _buffers(dim_k, key_tile)
    rows, keys = (GROUP_ROWS.value // group, group), (buffers["BLOCK_N"], 1)
    dk, dk_tail = split_head_dim(dim_k)
    _forward_kernel[(min(num_items, num_multiprocessors(q)),)](
        *descriptors(q, rows), *descriptors(k, keys), descriptor(v, (*keys, dim_v)), descriptor(out, (*rows, dim_v)),
        begin, end, unseen, spans, lse,
        num_queries * group, num_kv_heads, num_items, softmax_scale,
        **buffers, G=group, DK=dk, DK_TAIL=dk_tail, DV=dim_v, num_warps=4,
    )  # fmt: skip


def _buffers(dim_k: int, key_tile: int) -> dict[str, int]:
    """Keys of a tile; slots for queries, and stages for keys and for values, in shared memory (227 KB)."""
    if dim_k <= 128:
        return {"BLOCK_N": key_tile, "SLOTS": 2, "K_STAGES": 256 // key_tile, "V_STAGES": 256 // key_tile}
    return {"BLOCK_N": 64, "SLOTS": 2, "K_STAGES": 2, "V_STAGES": 2}
