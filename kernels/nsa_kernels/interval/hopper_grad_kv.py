"""dK and dV of compressed attention on Hopper, in Gluon: the sums of `grad_kv`, with the roles of warps apart.

A program owns 128 keys and walks 64-row tiles of the rows that see them. One warp copies tiles in, NUM_STAGES deep; two
groups of four warps own 64 keys each:

    S^T = K Q^T          dP^T = V dO^T          K, V, Q, dO from shared memory
    dV += P^T dO         dK += dS^T Q           P^T and dS^T from the registers in which they were made

While one group takes exponentials, the products of the other run. (Sums left in flight from one step to the next, so
that a group overlaps with itself too, make ptxas serialize all products: its registers do not suffice.)

Shapes      as `grad_kv`; D = Dk = Dv of 64 or 128, G divides 64, 16-bit inputs
Reference   nsa_kernels.reference.compressed_attention_backward
Source      Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3)
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa_kernels.common.hopper import ceil_div, descriptor, new_barriers
from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv
from nsa_kernels.interval.parts import num_splits, sum_parts, tile_ranges

BLOCK_M = gl.constexpr(64)  # rows of a tile
BLOCK_N = gl.constexpr(128)
GROUP_KEYS = gl.constexpr(64)  # keys of four warps
LOG2_E = gl.constexpr(1.4426950408889634)


@launchable
@gluon.jit
def _grad_kv_kernel(
    q_desc, k_desc, v_desc, grad_out_desc, statistics_desc, begin_ptr, end_ptr, tile_range_ptr,
    grad_k_ptr, grad_v_ptr,
    num_queries, num_padded_rows, num_keys, num_heads_kv, softmax_scale,
    NUM_SPLITS: gl.constexpr, NUM_STAGES: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    # The first key tiles are seen by most queries: they start first.
    part = gl.program_id(0) % NUM_SPLITS
    head = gl.program_id(0) // NUM_SPLITS % num_heads_kv
    tile = gl.program_id(0) // NUM_SPLITS // num_heads_kv
    num_groups = ceil_div(num_keys, GROUP_KEYS)
    second = gl.minimum(2 * tile + 1, num_groups - 1)
    seen_from = gl.load(tile_range_ptr + 2 * tile) * G // BLOCK_M * BLOCK_M
    seen_to = gl.load(tile_range_ptr + num_groups + second) * G
    part_len = ceil_div(ceil_div(gl.maximum(seen_to - seen_from, 0), NUM_SPLITS), BLOCK_M) * BLOCK_M
    first = seen_from + part * part_len
    num_steps = ceil_div(gl.maximum(gl.minimum(seen_to - first, part_len), 0), BLOCK_M)

    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [BLOCK_N, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [BLOCK_N, 1, D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [NUM_STAGES, BLOCK_M // G, G, D], q_desc.layout)
    grad_out_smem = gl.allocate_shared_memory(dtype, [NUM_STAGES, BLOCK_M // G, G, D], grad_out_desc.layout)
    statistics_smem = gl.allocate_shared_memory(gl.float32, [NUM_STAGES * 3, BLOCK_M], statistics_desc.layout)

    buffers = (k_smem, v_smem, q_smem, grad_out_smem, statistics_smem)
    barriers = (new_barriers(1, 1), new_barriers(NUM_STAGES, 1), new_barriers(NUM_STAGES, 2))
    place = (head, tile, part, first, num_steps)
    mask = (begin_ptr, end_ptr, tile_range_ptr, num_queries)
    sizes = (num_keys, num_heads_kv, num_padded_rows)
    sums = (grad_k_ptr, grad_v_ptr)
    gl.warp_specialize(
        [
            (_sum_up, (0, buffers, barriers, place, mask, sizes, sums, softmax_scale)),
            (_sum_up, (1, buffers, barriers, place, mask, sizes, sums, softmax_scale)),
            (_copy, (k_desc, v_desc, q_desc, grad_out_desc, statistics_desc, buffers, barriers, place, sizes)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _copy(k_desc, v_desc, q_desc, grad_out_desc, statistics_desc, buffers, barriers, place, sizes):
    """Keys and values once, then queries, dO and statistics of each step."""
    k_smem, v_smem, q_smem, grad_out_smem, statistics_smem = buffers
    keys_there, full, empty = barriers
    head, tile, _part, first, num_steps = place
    _num_keys, num_heads_kv, num_padded_rows = sizes
    NUM_STAGES: gl.constexpr = q_smem.shape[0]
    G: gl.constexpr = q_smem.shape[2]
    BYTES: gl.constexpr = 2 * q_desc.block_type.nbytes + 3 * statistics_desc.block_type.nbytes
    if num_steps > 0:
        mbarrier.expect(keys_there.index(0), 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [tile * BLOCK_N, head, 0], keys_there.index(0), k_smem)
        tma.async_copy_global_to_shared(v_desc, [tile * BLOCK_N, head, 0], keys_there.index(0), v_smem)
    for step in range(num_steps):
        stage = step % NUM_STAGES
        row = first + step * BLOCK_M
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), (step // NUM_STAGES & 1) ^ 1)
        mbarrier.expect(ready, BYTES)
        tma.async_copy_global_to_shared(q_desc, [row // G, head * G, 0], ready, q_smem.index(stage))
        tma.async_copy_global_to_shared(grad_out_desc, [row // G, head * G, 0], ready, grad_out_smem.index(stage))
        for plane in gl.static_range(3):
            at = (plane * num_heads_kv + head) * num_padded_rows + row
            tma.async_copy_global_to_shared(statistics_desc, [at], ready, statistics_smem.index(stage * 3 + plane))


@gluon.jit
def _sum_up(WHICH: gl.constexpr, buffers, barriers, place, mask, sizes, sums, softmax_scale):
    """Partial dK and dV of GROUP_KEYS keys."""
    k_smem, v_smem, q_smem, grad_out_smem, statistics_smem = buffers
    keys_there, full, empty = barriers
    head, tile, part, first, num_steps = place
    num_keys, num_heads_kv, _num_padded_rows = sizes
    grad_k_ptr, grad_v_ptr = sums
    NUM_STAGES: gl.constexpr = q_smem.shape[0]
    G: gl.constexpr = q_smem.shape[2]
    D: gl.constexpr = q_smem.shape[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    k = k_smem.reshape([BLOCK_N, D]).slice(WHICH * GROUP_KEYS, GROUP_KEYS)
    v = v_smem.reshape([BLOCK_N, D]).slice(WHICH * GROUP_KEYS, GROUP_KEYS)
    first_key = tile * BLOCK_N + WHICH * GROUP_KEYS
    begin_ptr, end_ptr, tile_range_ptr, num_queries = mask
    num_groups = ceil_div(num_keys, GROUP_KEYS)
    ranges = tile_range_ptr + gl.minimum(2 * tile + WHICH, num_groups - 1)
    first_step = gl.minimum(gl.maximum(gl.load(ranges) * G - first, 0) // BLOCK_M, num_steps)
    stop_step = ceil_div(gl.maximum(gl.load(ranges + num_groups) * G - first, 0), BLOCK_M)
    stop_step = gl.maximum(gl.minimum(stop_step, num_steps), first_step)
    full_from = gl.load(ranges + 2 * num_groups) * G  # rows in [full_from, full_to) see all keys of this group
    full_to = gl.load(ranges + 3 * num_groups) * G
    mask = (begin_ptr, end_ptr, full_from, full_to, num_queries)
    nothing = gl.zeros([GROUP_KEYS, BLOCK_M], gl.float32, SCORES)
    grad_k = gl.zeros([GROUP_KEYS, D], gl.float32, SUMS)
    grad_v = gl.zeros([GROUP_KEYS, D], gl.float32, SUMS)
    scale = softmax_scale * LOG2_E
    if num_steps > 0:
        mbarrier.wait(keys_there.index(0), 0)
    _pass_over(0, first_step, full, empty)
    for step in range(first_step, stop_step):
        stage = step % NUM_STAGES
        mbarrier.wait(full.index(stage), step // NUM_STAGES & 1)
        q = q_smem.index(stage).reshape([BLOCK_M, D])
        grad_out = grad_out_smem.index(stage).reshape([BLOCK_M, D])
        s = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)  # [GROUP_KEYS, BLOCK_M]
        grad_p = warpgroup_mma(v, grad_out.permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])

        p = gl.exp2(gl.fma(s, scale, -_statistic(statistics_smem, stage * 3, SCORES)))
        p = _masked(p, first + step * BLOCK_M, first_key, mask, G)
        p = p * _statistic(statistics_smem, stage * 3 + 2, SCORES)
        grad_v = warpgroup_mma(gl.convert_layout(p.to(q.dtype), OPERAND), grad_out, grad_v, is_async=True)
        grad_p = warpgroup_mma_wait(1, deps=[grad_p])
        grad_s = p * (grad_p - _statistic(statistics_smem, stage * 3 + 1, SCORES))
        grad_k = warpgroup_mma(gl.convert_layout(grad_s.to(q.dtype), OPERAND), q, grad_k, is_async=True)
        grad_k, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_v])
        mbarrier.arrive(empty.index(stage))
    _pass_over(stop_step, num_steps, full, empty)

    key = first_key + gl.arange(0, GROUP_KEYS, gl.SliceLayout(1, SUMS))
    slot = ((part * num_keys + key).to(gl.int64) * num_heads_kv + head) * D
    at = gl.expand_dims(slot, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, SUMS)), 0)
    inside = gl.expand_dims(key < num_keys, 1)
    gl.store(grad_k_ptr + at, (grad_k * softmax_scale).to(grad_k_ptr.dtype.element_ty), mask=inside)
    gl.store(grad_v_ptr + at, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _pass_over(start, stop, full, empty):
    """Steps whose rows see no key of this group, but one of the other's."""
    NUM_STAGES: gl.constexpr = full.shape[0]
    for step in range(start, stop):
        mbarrier.wait(full.index(step % NUM_STAGES), step // NUM_STAGES & 1)
        mbarrier.arrive(empty.index(step % NUM_STAGES))


@gluon.jit
def _statistic(statistics_smem, index, SCORES: gl.constexpr):
    """One number per row, [1, BLOCK_M]; loaded just before it is needed, for registers are scarce."""
    return gl.expand_dims(statistics_smem.index(index).load(gl.SliceLayout(0, SCORES)), 0)


@gluon.jit
def _masked(p, first_row, first_key, mask, G: gl.constexpr):
    """`p` [keys, rows], 0 where the row does not see the key."""
    begin_ptr, end_ptr, full_from, full_to, num_queries = mask
    if (first_row < full_from) | (first_row + BLOCK_M > full_to):
        row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, p.type.layout))
        query = gl.minimum(row // G, num_queries - 1)
        begin = gl.expand_dims(gl.load(begin_ptr + query), 0)
        end = gl.expand_dims(gl.load(end_ptr + query), 0)
        key = gl.expand_dims(first_key + gl.arange(0, GROUP_KEYS, gl.SliceLayout(1, p.type.layout)), 1)
        p = gl.where((key >= begin) & (key < end), p, 0.0)
    return p


def grad_kv(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, statistics: Tensor, grad_out: Tensor, softmax_scale,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV [M, Hkv, D] in `dtype`; None: that of k.

    H200, bf16, 65,536 tokens, D 128, Hq 64, Hkv 4: 13.4 ms (653 TFLOP/s) alone, 15.5 sustained at the card's power
    limit, where `grad_kv` takes 18.0 and 20.2. 16 splits and 2 stages: the same within 1%.
    """
    num_queries, num_q_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[:2]
    group = num_q_heads // num_kv_heads
    num_key_tiles = cdiv(num_keys, BLOCK_N.value)
    splits = num_splits(num_key_tiles * num_kv_heads)
    dtype = dtype or k.dtype
    parts_dtype = torch.float32 if splits > 1 else dtype
    grad_k, grad_v = torch.empty(2, splits, *k.shape, dtype=parts_dtype, device=k.device)
    rows, keys = (BLOCK_M.value // group, group, head_dim), (BLOCK_N.value, 1, head_dim)
    _grad_kv_kernel[(num_key_tiles * num_kv_heads * splits,)](
        descriptor(q, rows), descriptor(k, keys), descriptor(v, keys), descriptor(grad_out, rows),
        descriptor(statistics.view(-1), (BLOCK_M.value,)), begin, end,
        tile_ranges(begin, end, num_keys, GROUP_KEYS.value),
        grad_k, grad_v,
        num_queries, statistics.shape[2], num_keys, num_kv_heads, softmax_scale,
        NUM_SPLITS=splits, NUM_STAGES=3, G=group, D=head_dim, num_warps=4,
    )  # fmt: skip
    return (grad_k[0], grad_v[0]) if splits == 1 else sum_parts(grad_k, grad_v, dtype)
