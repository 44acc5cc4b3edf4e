"""dQ of compressed attention and of the window on Hopper, in Gluon: the sums of `cmp_grad_q` and `win_grad_q`.

Roles of warps are apart. Every multiprocessor takes tiles of 128 rows in turn. One warp copies their queries, dO, keys
and values in; two groups of four warps own 64 rows each:

    S = Q K^T          dP = dO V^T          dQ += dS K          dS from the registers in which it was made

While one group takes exponentials, the products of the other run.

Shapes      as `cmp_grad_q`; Dk of 64, 128 or 192, Dv of 64 or 128, G divides 64, 16-bit inputs
Reference   nsa_kernels.reference.compressed_attention_backward
Source      Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3)
"""

import torch
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
from nsa_kernels.common.hopper import copy_rows, descriptor, descriptors, dot, new_barriers, tile
from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import split_head_dim
from nsa_kernels.interval.hopper_forward import BLOCK_M, GROUP_ROWS, LOG2_E, blank_unseen, place
from nsa_kernels.interval.tiles import num_tiles

BLOCK_N = gl.constexpr(64)


@launchable
@gluon.jit
def _grad_q_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, grad_out_desc, grad_q_desc, grad_q_tail_desc,
    statistics_ptr, begin_ptr, end_ptr, unseen_ptr, spans_ptr,
    num_rows, num_padded_rows, num_heads_kv, num_items, softmax_scale,
    SLOTS: gl.constexpr, STAGES: gl.constexpr,
    G: gl.constexpr, DK: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = q_desc.layout
    q_smem = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_ROWS // G, G, DK], LAYOUT)
    grad_out_smem = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_ROWS // G, G, DV], LAYOUT)
    grad_q_smem = gl.allocate_shared_memory(dtype, [2, GROUP_ROWS // G, G, DK], LAYOUT)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, DK], LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, DV], LAYOUT)
    q_tail_smem, k_tail_smem, grad_q_tail_smem = q_smem, k_smem, grad_q_smem  # not read without a tail
    if DK_TAIL > 0:
        q_tail_smem = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_ROWS // G, G, DK_TAIL], LAYOUT)
        k_tail_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, DK_TAIL], LAYOUT)
        grad_q_tail_smem = gl.allocate_shared_memory(dtype, [2, GROUP_ROWS // G, G, DK_TAIL], LAYOUT)
    q_full = new_barriers(SLOTS, 1)
    q_empty = new_barriers(SLOTS, 2)
    full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)

    descs = (q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, grad_out_desc)
    results = (grad_q_desc, grad_q_tail_desc, grad_q_smem, grad_q_tail_smem)
    buffers = (q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, grad_out_smem)
    barriers = (q_full, q_empty, full, empty)
    queries = (begin_ptr, end_ptr, spans_ptr)
    pointers = (statistics_ptr, unseen_ptr)
    sizes = (num_rows, num_heads_kv, num_items)
    gl.warp_specialize(
        [
            (_sum_up, (0, buffers, barriers, results, pointers, queries, sizes, num_padded_rows, softmax_scale)),
            (_sum_up, (1, buffers, barriers, results, pointers, queries, sizes, num_padded_rows, softmax_scale)),
            (_copy, (descs, buffers, barriers, queries, sizes)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _copy(descs, buffers, barriers, queries, sizes):
    """Queries and dO of each item, and keys and values of each of its tiles."""
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, grad_out_desc = descs
    q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, grad_out_smem = buffers
    q_full, q_empty, full, empty = barriers
    SLOTS: gl.constexpr = q_full.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    G: gl.constexpr = q_smem.shape[2]
    Q_TAIL_BYTES: gl.constexpr = 0 if q_tail_desc is None else q_tail_desc.block_type.nbytes
    K_TAIL_BYTES: gl.constexpr = 0 if k_tail_desc is None else k_tail_desc.block_type.nbytes
    step = 0
    for item in range(gl.program_id(0), sizes[2], gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        head, row, first_key, num_tiles, _begun, _ended = place(item, queries, sizes, G, BLOCK_N)
        slot = turn % SLOTS
        here = q_full.index(slot)
        mbarrier.wait(q_empty.index(slot), (turn // SLOTS & 1) ^ 1)
        mbarrier.expect(here, 2 * (q_desc.block_type.nbytes + Q_TAIL_BYTES + grad_out_desc.block_type.nbytes))
        for half in gl.static_range(2):
            query = (row + half * GROUP_ROWS) // G
            copy_rows(q_desc, q_tail_desc, query, head * G, here, q_smem, q_tail_smem, slot * 2 + half)
            grad_out = grad_out_smem.index(slot * 2 + half)
            tma.async_copy_global_to_shared(grad_out_desc, [query, head * G, 0], here, grad_out)
        for i in range(num_tiles):
            stage = step % STAGES
            key = first_key + i * BLOCK_N
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, k_desc.block_type.nbytes + K_TAIL_BYTES + v_desc.block_type.nbytes)
            copy_rows(k_desc, k_tail_desc, key, head, ready, k_smem, k_tail_smem, stage)
            tma.async_copy_global_to_shared(v_desc, [key, head, 0], ready, v_smem.index(stage))
            step += 1


@gluon.jit
def _sum_up(WHICH: gl.constexpr, buffers, barriers, results, pointers, queries, sizes, num_padded_rows, softmax_scale):
    """dQ of GROUP_ROWS rows of every item."""
    q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, grad_out_smem = buffers
    grad_q_desc, grad_q_tail_desc, grad_q_smem, grad_q_tail_smem = results
    q_full, q_empty, full, empty = barriers
    statistics_ptr, unseen_ptr = pointers
    begin_ptr, end_ptr, _spans_ptr = queries
    num_rows, num_heads_kv, num_items = sizes
    SLOTS: gl.constexpr = q_full.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    G: gl.constexpr = q_smem.shape[2]
    DK: gl.constexpr = q_smem.shape[3]
    dtype: gl.constexpr = q_smem.dtype
    TAIL: gl.constexpr = grad_q_tail_desc is not None
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    TAIL_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    nothing = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, SCORES)
    column = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES)), 0)
    plane = num_padded_rows.to(gl.int64) * num_heads_kv
    scale = softmax_scale * LOG2_E
    step = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        head, first_row, first_key, num_tiles, all_begun, none_ended = place(item, queries, sizes, G, BLOCK_N)
        row = first_row + WHICH * GROUP_ROWS + gl.arange(0, GROUP_ROWS, ROWS)
        query = gl.minimum(row, num_rows - 1) // G
        begin = gl.expand_dims(gl.load(begin_ptr + query), 1)
        end = gl.expand_dims(gl.load(end_ptr + query), 1)
        statistics = statistics_ptr + head.to(gl.int64) * num_padded_rows + row
        base = -gl.expand_dims(gl.load(statistics), 1)
        delta = gl.expand_dims(gl.load(statistics + plane), 1)
        gate = gl.load(statistics + 2 * plane)
        grad_q = gl.zeros([GROUP_ROWS, DK], gl.float32, SUMS)
        grad_q_tail = gl.zeros([GROUP_ROWS, 64], gl.float32, TAIL_SUMS)  # unused without a tail

        lowest = gl.load(begin_ptr + first_row // G)
        highest = gl.load(end_ptr + gl.minimum(first_row + BLOCK_M, num_rows) // G - 1)
        slot = turn % SLOTS
        q = tile(q_smem, slot * 2 + WHICH, GROUP_ROWS)
        q_tail = tile(q_tail_smem, slot * 2 + WHICH, GROUP_ROWS)
        grad_out = tile(grad_out_smem, slot * 2 + WHICH, GROUP_ROWS)
        mbarrier.wait(q_full.index(slot), turn // SLOTS & 1)
        for i in range(num_tiles):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            k = tile(k_smem, stage, BLOCK_N)
            k_tail = tile(k_tail_smem, stage, BLOCK_N)
            v = tile(v_smem, stage, BLOCK_N)
            key = first_key + i * BLOCK_N
            blank_unseen(k, key, lowest, highest, unseen_ptr)
            if TAIL:
                blank_unseen(k_tail, key, lowest, highest, unseen_ptr)
            blank_unseen(v, key, lowest, highest, unseen_ptr)
            s = dot(q, q_tail, k, k_tail, nothing, TAIL)
            grad_p = warpgroup_mma(grad_out, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            if (key < all_begun) | (key + BLOCK_N > none_ended):
                s = gl.where((key + column >= begin) & (key + column < end), s, float("-inf"))
            p = gl.exp2(gl.fma(s, scale, base))
            grad_p = warpgroup_mma_wait(0, deps=[grad_p])
            mbarrier.arrive(q_empty.index(slot), pred=i == num_tiles - 1)
            grad_s = gl.convert_layout((p * (grad_p - delta)).to(dtype), OPERAND)
            grad_q = warpgroup_mma(grad_s, k, grad_q, is_async=True)
            if TAIL:
                grad_q_tail = warpgroup_mma(grad_s, k_tail, grad_q_tail, is_async=True)
                grad_q, grad_q_tail = warpgroup_mma_wait(0, deps=[grad_q, grad_q_tail])
            else:
                grad_q = warpgroup_mma_wait(0, deps=[grad_q])
            mbarrier.arrive(empty.index(stage))
            step += 1
        mbarrier.arrive(q_empty.index(slot), pred=num_tiles == 0)

        factor = gl.expand_dims(gl.convert_layout(gate * softmax_scale, gl.SliceLayout(1, SUMS)), 1)
        at = (first_row + WHICH * GROUP_ROWS) // G
        tma.store_wait(0)
        grad_q_smem.index(WHICH).reshape([GROUP_ROWS, DK]).store((grad_q * factor).to(dtype))
        if TAIL:
            factor = gl.expand_dims(gl.convert_layout(gate * softmax_scale, gl.SliceLayout(1, TAIL_SUMS)), 1)
            grad_q_tail_smem.index(WHICH).reshape([GROUP_ROWS, 64]).store((grad_q_tail * factor).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(grad_q_desc, [at, head * G, 0], grad_q_smem.index(WHICH))
        if TAIL:
            tma.async_copy_shared_to_global(grad_q_tail_desc, [at, head * G, DK], grad_q_tail_smem.index(WHICH))
    tma.store_wait(0)


def grad_q(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, statistics: Tensor, grad_out: Tensor, softmax_scale,
    *, unseen: Tensor | None = None, spans: Tensor | None = None, into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dQ [T, Hq, Dk] in the dtype of q, `into` what is given; `unseen` and `spans` as in `hopper_forward.attend`.

    H200, bf16, 65,536 tokens, D 128, Hq 64, Hkv 4: 8.7 ms (760 TFLOP/s) alone, 9.8 sustained at the card's power limit,
    where `cmp_grad_q` takes 10.4 and 11.8; 8,192 tokens: 0.23 and 0.32.
    """
    num_queries, num_q_heads, dim_k = q.shape
    num_kv_heads, dim_v = v.shape[1:]
    group = num_q_heads // num_kv_heads
    num_items = num_tiles(num_queries, spans, group, BLOCK_M.value) * num_kv_heads
    rows, keys = (GROUP_ROWS.value // group, group), (BLOCK_N.value, 1)
    dk, dk_tail = split_head_dim(dim_k)
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if into is None else into
    _grad_q_kernel[(min(num_items, num_multiprocessors(q)),)](
        *descriptors(q, rows), *descriptors(k, keys), descriptor(v, (*keys, dim_v)),
        descriptor(grad_out, (*rows, dim_v)), *descriptors(result, rows), statistics, begin, end, unseen, spans,
        num_queries * group, statistics.shape[2], num_kv_heads, num_items, softmax_scale,
        SLOTS=1 if dk_tail else 2, STAGES=2, G=group, DK=dk, DK_TAIL=dk_tail, DV=dim_v, num_warps=4,
    )  # fmt: skip
    return result
