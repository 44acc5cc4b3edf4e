"""Block importances on Hopper, in Gluon: `select`'s sums with the roles of warps apart.

Every multiprocessor takes tiles of 256 (query, head) rows in turn. One warp copies them and their keys in; four groups
of four warps own 64 rows each. They take turns at the tensor cores: while one waits for its products Q K^T, the others
take exponentials and add up.

Keys of a tile lie in shared memory by residue slowly and block fast, so that the S keys of a block are in one thread's
registers: a copy of a [S, tile / S] box of the overlapping view k[residue + S * block].

Shapes      as `select`; G of 8, 16, 32 or 64, Dk of 64, 128 or 192, S = l' / d a power of two, 16-bit inputs
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from nsa_kernels.common.device import num_multiprocessors
from nsa_kernels.common.hopper import copy_rows, descriptors, dot, new_barriers, tile, uniform
from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, split_head_dim

GROUP_ROWS = gl.constexpr(64)  # rows of four warps
NUM_GROUPS = gl.constexpr(4)
BLOCK_N = gl.constexpr(128)
LOG2_E = gl.constexpr(1.4426950408889634)
FAR = gl.constexpr(2**31 - 1)


@launchable
@gluon.jit
def _importance_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, lse_ptr, begin_ptr, end_ptr,
    imp_ptr,
    first_query, last_query, chunk_len, num_heads_kv, num_blocks, num_items, softmax_scale, stride_lt, stride_lh,
    CELLS_CMP: gl.constexpr, CELLS_SLC: gl.constexpr, NUM_LAYERS: gl.constexpr, SLOTS: gl.constexpr,
    STAGES: gl.constexpr, G: gl.constexpr, DK: gl.constexpr, DK_TAIL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    BLOCKS: gl.constexpr = BLOCK_N // CELLS_SLC
    q_smem = gl.allocate_shared_memory(dtype, [SLOTS * NUM_GROUPS, GROUP_ROWS // G, G, DK], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, CELLS_SLC, BLOCKS, 1, DK], k_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem  # not read without a tail
    if DK_TAIL > 0:
        q_tail_smem = gl.allocate_shared_memory(dtype, [SLOTS * NUM_GROUPS, GROUP_ROWS // G, G, DK_TAIL], q_desc.layout)
        k_tail_smem = gl.allocate_shared_memory(dtype, [STAGES, CELLS_SLC, BLOCKS, 1, DK_TAIL], k_desc.layout)
    q_full = new_barriers(SLOTS, 1)
    q_empty = new_barriers(SLOTS, NUM_GROUPS)
    k_full = new_barriers(STAGES, 1)
    k_empty = new_barriers(STAGES, NUM_GROUPS)
    turns = new_barriers(NUM_GROUPS, 1)

    buffers = (q_smem, q_tail_smem, k_smem, k_tail_smem)
    barriers = (q_full, q_empty, k_full, k_empty, turns)
    pointers = (lse_ptr, begin_ptr, end_ptr, imp_ptr)
    sizes = (first_query, last_query, chunk_len, num_heads_kv, num_blocks, num_items, stride_lt, stride_lh)
    gl.warp_specialize(
        [
            (_score, (0, buffers, barriers, pointers, sizes, softmax_scale, CELLS_CMP, NUM_LAYERS)),
            (_score, (1, buffers, barriers, pointers, sizes, softmax_scale, CELLS_CMP, NUM_LAYERS)),
            (_score, (2, buffers, barriers, pointers, sizes, softmax_scale, CELLS_CMP, NUM_LAYERS)),
            (_score, (3, buffers, barriers, pointers, sizes, softmax_scale, CELLS_CMP, NUM_LAYERS)),
            (_copy, (q_desc, q_tail_desc, k_desc, k_tail_desc, buffers, barriers, begin_ptr, end_ptr, sizes)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )


@gluon.jit
def _intervals(begin_ptr, end_ptr, query, last_query):
    """The first compressed key of each query and how many it sees; none past the end of the chunk."""
    begin = gl.load(begin_ptr + query, mask=query < last_query, other=0)
    end = gl.load(end_ptr + query, mask=query < last_query, other=0)
    return begin, gl.maximum(end - begin, 0)


@gluon.jit
def _next_document(begin, num_seen, after):
    """The first document after row `after` that a query of the tile sees keys of, or FAR."""
    return gl.min(gl.where((num_seen > 0) & (begin > after), begin, FAR), 0)


@gluon.jit
def _copy(q_desc, q_tail_desc, k_desc, k_tail_desc, buffers, barriers, begin_ptr, end_ptr, sizes):
    q_smem, q_tail_smem, k_smem, k_tail_smem = buffers
    q_full, q_empty, k_full, k_empty, _turns = barriers
    first_query, last_query, _chunk_len, num_heads_kv, _num_blocks, num_items, _stride_t, _stride_h = sizes
    SLOTS: gl.constexpr = q_full.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    CELLS_SLC: gl.constexpr = k_smem.shape[1]
    G: gl.constexpr = q_smem.shape[2]
    QUERIES: gl.constexpr = NUM_GROUPS * GROUP_ROWS // G
    Q_TAIL_BYTES: gl.constexpr = 0 if q_tail_desc is None else q_tail_desc.block_type.nbytes
    K_TAIL_BYTES: gl.constexpr = 0 if k_tail_desc is None else k_tail_desc.block_type.nbytes
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        head = item % num_heads_kv
        query = first_query + item // num_heads_kv * QUERIES
        slot = turn % SLOTS
        here = q_full.index(slot)
        mbarrier.wait(q_empty.index(slot), (turn // SLOTS & 1) ^ 1)
        mbarrier.expect(here, NUM_GROUPS * (q_desc.block_type.nbytes + Q_TAIL_BYTES))
        for i in gl.static_range(NUM_GROUPS):
            at = query + i * (GROUP_ROWS // G)
            copy_rows(q_desc, q_tail_desc, at, head * G, here, q_smem, q_tail_smem, slot * NUM_GROUPS + i)
        begin, num_seen = _intervals(begin_ptr, end_ptr, query + gl.arange(0, QUERIES, LANES), last_query)
        doc = _next_document(begin, num_seen, -1)
        while doc < FAR:
            most = gl.max(gl.where(begin == doc, num_seen, 0), 0)
            for key in range(doc, doc + most, BLOCK_N):
                stage = step % STAGES
                ready = k_full.index(stage)
                mbarrier.wait(k_empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(ready, k_desc.block_type.nbytes + K_TAIL_BYTES)
                residue, block = key % CELLS_SLC, key // CELLS_SLC
                tma.async_copy_global_to_shared(k_desc, [residue, block, head, 0], ready, k_smem.index(stage))
                if k_tail_desc is not None:
                    rest = [residue, block, head, k_smem.shape[4]]
                    tma.async_copy_global_to_shared(k_tail_desc, rest, ready, k_tail_smem.index(stage))
                step += 1
            doc = _next_document(begin, num_seen, doc)


@gluon.jit
def _share(p, layer: gl.constexpr, G: gl.constexpr, CELLS_CMP: gl.constexpr, CELLS_SLC: gl.constexpr):
    """What the probabilities [rows, keys] give to layer `layer` of each query and block: [queries, blocks], eq. 9."""
    BLOCKS: gl.constexpr = BLOCK_N // CELLS_SLC
    TOGETHER: gl.constexpr = 8 if G == 8 else 4  # sums of 8 heads of a query
    residue = gl.arange(0, BLOCK_N, gl.SliceLayout(0, p.type.layout)) // BLOCKS
    cells = gl.minimum(residue - layer * CELLS_SLC + CELLS_CMP, CELLS_SLC)
    cells -= gl.maximum(residue - layer * CELLS_SLC, 0)
    weight = gl.expand_dims(gl.maximum(cells, 0).to(gl.float32), 0)
    # -0.0, unlike 0.0, is what the compiler may leave out of a sum.
    weighted = gl.where(weight > 0, p * weight, -0.0)
    weighted = gl.reshape(weighted, [4, 2, 8, CELLS_SLC, BLOCKS])  # a row's warp, register and lane
    share = gl.sum(weighted, 3)
    if G > 8:
        share = gl.sum(share, 1)
    share = gl.reshape(share, [TOGETHER, 8, BLOCKS])
    # 8 lanes hold a head each of the same blocks: they trade heads for blocks, so that a sum is made by one lane only.
    share = gl.convert_layout(share, gl.BlockedLayout([TOGETHER // 4, 8, 1], [1, 1, 32], [4, 1, 1], [2, 1, 0]))
    for level in gl.static_range(3):
        share = gl.sum(gl.reshape(share, [TOGETHER, 2, 4 >> level, BLOCKS]), 1)
    share = gl.reshape(share, [GROUP_ROWS // G, TOGETHER * G // GROUP_ROWS, BLOCKS])
    return gl.sum(share, 1)


@gluon.jit
def _score(
    WHICH: gl.constexpr, buffers, barriers, pointers, sizes, softmax_scale,
    CELLS_CMP: gl.constexpr, NUM_LAYERS: gl.constexpr,
):  # fmt: skip
    """buffer[h, query of the chunk, layer, j] for the queries of GROUP_ROWS rows and each block with a key they see."""
    q_smem, q_tail_smem, k_smem, k_tail_smem = buffers
    q_full, q_empty, k_full, k_empty, turns = barriers
    lse_ptr, begin_ptr, end_ptr, imp_ptr = pointers
    first_query, last_query, chunk_len, num_heads_kv, num_blocks, num_items, stride_lt, stride_lh = sizes
    SLOTS: gl.constexpr = q_full.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    CELLS_SLC: gl.constexpr = k_smem.shape[1]
    G: gl.constexpr = q_smem.shape[2]
    TAIL: gl.constexpr = q_tail_smem.shape[3] < q_smem.shape[3]
    QUERIES: gl.constexpr = NUM_GROUPS * GROUP_ROWS // G
    BLOCKS: gl.constexpr = BLOCK_N // CELLS_SLC
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    TILE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    nothing = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, SCORES)
    SHARES: gl.constexpr = _share(nothing, 0, G, CELLS_CMP, CELLS_SLC).type.layout
    scale = softmax_scale * LOG2_E
    row = gl.arange(0, GROUP_ROWS, ROWS)
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    column_key = gl.expand_dims(column % BLOCKS * CELLS_SLC + column // BLOCKS, 0)
    i = gl.arange(0, GROUP_ROWS // G, gl.SliceLayout(1, SHARES))
    block = gl.expand_dims(gl.arange(0, BLOCKS, gl.SliceLayout(0, SHARES)), 0)
    step = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        head = item % num_heads_kv
        tile_query = first_query + item // num_heads_kv * QUERIES
        query = tile_query + WHICH * (GROUP_ROWS // G)
        tile_begin, tile_seen = _intervals(begin_ptr, end_ptr, tile_query + gl.arange(0, QUERIES, TILE), last_query)
        row_begin, row_seen = _intervals(begin_ptr, end_ptr, query + row // G, last_query)
        share_begin, share_seen = _intervals(begin_ptr, end_ptr, query + i, last_query)
        row_query = gl.minimum(query + row // G, last_query - 1).to(gl.int64)
        lse = gl.load(lse_ptr + row_query * stride_lt + (head * G + row % G).to(gl.int64) * stride_lh)
        base = gl.where(row_seen > 0, lse * LOG2_E, float("inf"))
        imp_tile = imp_ptr + (head.to(gl.int64) * chunk_len + query - first_query) * NUM_LAYERS * num_blocks
        imp_at = imp_tile + (gl.expand_dims(i * (NUM_LAYERS * num_blocks), 1) + block)

        slot = uniform(turn % SLOTS)
        q = tile(q_smem, slot * NUM_GROUPS + WHICH, GROUP_ROWS)
        q_tail = tile(q_tail_smem, slot * NUM_GROUPS + WHICH, GROUP_ROWS)
        mbarrier.wait(q_full.index(slot), turn // SLOTS & 1)
        doc = _next_document(tile_begin, tile_seen, -1)
        while doc < FAR:
            most = gl.max(gl.where(tile_begin == doc, tile_seen, 0), 0)
            seen = gl.where(row_begin == doc, row_seen, 0)  # [rows], keys of this document that the row sees
            least = gl.min(seen, 0)
            stored = gl.expand_dims((share_begin == doc) & (share_seen > 0), 1)
            for first_key in range(0, most, BLOCK_N):
                stage = uniform(step % STAGES)
                mbarrier.wait(k_full.index(stage), step // STAGES & 1)
                k, k_tail = tile(k_smem, stage, BLOCK_N), tile(k_tail_smem, stage, BLOCK_N)
                mbarrier.wait(turns.index(WHICH), (step & 1) ^ (WHICH == 0))
                s = dot(q, q_tail, k, k_tail, nothing, TAIL)
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(turns.index((WHICH + 1) % NUM_GROUPS))
                mbarrier.arrive(k_empty.index(stage))
                step += 1
                if first_key + BLOCK_N > least:
                    s = gl.where(first_key + column_key < gl.expand_dims(seen, 1), s, float("-inf"))
                p = gl.exp2(gl.fma(s, scale, -gl.expand_dims(base, 1)))
                first_block = first_key // CELLS_SLC
                for layer in gl.static_range(NUM_LAYERS):
                    gl.store(
                        imp_at + (layer * num_blocks + first_block),
                        _share(p, layer, G, CELLS_CMP, CELLS_SLC),
                        mask=stored & (first_block + block < num_blocks),
                    )
            doc = _next_document(tile_begin, tile_seen, doc)
        mbarrier.arrive(q_empty.index(slot))


def boxes_of_blocks(k: Tensor, cells_slc: int) -> Tensor:
    """The view [2 S - 1, blocks, Hkv, D] of `k` whose [r, j] is row r + S * j, over rows of zeros past the end.

    A box that begins at [r, j] holds the S keys of every block of a document that begins at row r + S * j.
    """
    num_keys, num_heads, head_dim = k.shape
    rows = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, 2 * cells_slc))
    stride_n, stride_h, _ = rows.stride()
    shape = (2 * cells_slc - 1, cdiv(num_keys, cells_slc), num_heads, head_dim)
    return rows.as_strided(shape, (stride_n, cells_slc * stride_n, stride_h, 1))


def importance(
    q: Tensor, boxes: Tensor, lse: Tensor, begin: Tensor, end: Tensor, out: Tensor, first: int, last: int,
    *, softmax_scale: float, cells_cmp: int, cells_slc: int,
) -> None:  # fmt: skip
    """Writes out [Hkv, queries of a chunk, layers, blocks] fp32 for the queries [first, last)."""
    num_kv_heads, dim_k = boxes.shape[2:]
    group = q.shape[1] // num_kv_heads
    queries = NUM_GROUPS.value * GROUP_ROWS.value // group
    num_items = cdiv(last - first, queries) * num_kv_heads
    dk, dk_tail = split_head_dim(dim_k)
    _importance_kernel[(min(num_items, num_multiprocessors(q)),)](
        *descriptors(q, (GROUP_ROWS.value // group, group)),
        *descriptors(boxes, (cells_slc, BLOCK_N.value // cells_slc, 1)),
        lse, begin, end,
        out,
        first, last, out.shape[1], num_kv_heads, out.shape[3], num_items, softmax_scale, *lse.stride(),
        CELLS_CMP=cells_cmp, CELLS_SLC=cells_slc, NUM_LAYERS=out.shape[2], SLOTS=1 if dk_tail else 2, STAGES=2,
        G=group, DK=dk, DK_TAIL=dk_tail, num_warps=4,
    )  # fmt: skip
