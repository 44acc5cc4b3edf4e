"""dK and dV of compressed attention on Hopper, in Gluon: the sums of `grad_kv`, with the roles of warps apart.

A program owns 128 keys and walks 64-row tiles of the rows that see them. One warp copies tiles in, STAGES deep; two
groups of four warps own 64 keys each:

    S^T = K Q^T          dP^T = V dO^T          K, V, Q, dO from shared memory
    dV += P^T dO         dK += dS^T Q           P^T and dS^T from the registers in which they were made

While one group takes exponentials, the products of the other run. (Sums left in flight from one step to the next, so
that a group overlaps with itself too, make ptxas serialize all products: its registers do not suffice. With 192 columns
of K the sums alone take 160 registers, and S and dP are made for 32 rows at a time.)

Shapes      as `grad_kv`; Dk of 64, 128 or 192, Dv of 64 or 128, G divides 64, 16-bit inputs
Reference   nsa_kernels.reference.compressed_attention_backward
Source      Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3)
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa_kernels.common.hopper import ceil_div, copy_rows, descriptor, descriptors, dot, new_barriers, tile
from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, split_head_dim
from nsa_kernels.interval.parts import num_splits, sum_parts, tile_ranges

BLOCK_M = gl.constexpr(64)  # rows of a tile
BLOCK_N = gl.constexpr(128)
GROUP_KEYS = gl.constexpr(64)  # keys of four warps
LOG2_E = gl.constexpr(1.4426950408889634)


@launchable
@gluon.jit
def _grad_kv_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, grad_out_desc, statistics_desc,
    begin_ptr, end_ptr, tile_range_ptr,
    grad_k_ptr, grad_v_ptr,
    num_queries, num_padded_rows, num_keys, num_heads_kv, softmax_scale,
    NUM_SPLITS: gl.constexpr, STAGES: gl.constexpr,
    G: gl.constexpr, DK: gl.constexpr, DK_TAIL: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    # The first key tiles are seen by most queries: they start first.
    part = gl.program_id(0) % NUM_SPLITS
    head = gl.program_id(0) // NUM_SPLITS % num_heads_kv
    key_tile = gl.program_id(0) // NUM_SPLITS // num_heads_kv
    num_groups = ceil_div(num_keys, GROUP_KEYS)
    second = gl.minimum(2 * key_tile + 1, num_groups - 1)
    seen_from = gl.load(tile_range_ptr + 2 * key_tile) * G // BLOCK_M * BLOCK_M
    seen_to = gl.load(tile_range_ptr + num_groups + second) * G
    part_len = ceil_div(ceil_div(gl.maximum(seen_to - seen_from, 0), NUM_SPLITS), BLOCK_M) * BLOCK_M
    first = seen_from + part * part_len
    num_steps = ceil_div(gl.maximum(gl.minimum(seen_to - first, part_len), 0), BLOCK_M)

    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = q_desc.layout
    k_smem = gl.allocate_shared_memory(dtype, [1, BLOCK_N, 1, DK], LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [1, BLOCK_N, 1, DV], LAYOUT)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M // G, G, DK], LAYOUT)
    grad_out_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M // G, G, DV], LAYOUT)
    k_tail_smem, q_tail_smem = k_smem, q_smem  # not read without a tail
    if DK_TAIL > 0:
        k_tail_smem = gl.allocate_shared_memory(dtype, [1, BLOCK_N, 1, DK_TAIL], LAYOUT)
        q_tail_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M // G, G, DK_TAIL], LAYOUT)
    statistics_smem = gl.allocate_shared_memory(gl.float32, [STAGES * 3, BLOCK_M], statistics_desc.layout)

    descs = (q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, grad_out_desc, statistics_desc)
    buffers = (q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, grad_out_smem, statistics_smem)
    barriers = (new_barriers(1, 1), new_barriers(STAGES, 1), new_barriers(STAGES, 2))
    place = (head, key_tile, part, first, num_steps)
    mask = (begin_ptr, end_ptr, tile_range_ptr, num_queries)
    sizes = (num_keys, num_heads_kv, num_padded_rows)
    sums = (grad_k_ptr, grad_v_ptr)
    gl.warp_specialize(
        [
            (_sum_up, (0, buffers, barriers, place, mask, sizes, sums, softmax_scale)),
            (_sum_up, (1, buffers, barriers, place, mask, sizes, sums, softmax_scale)),
            (_copy, (descs, buffers, barriers, place, sizes)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _copy(descs, buffers, barriers, place, sizes):
    """Keys and values once, then queries, dO and statistics of each step."""
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, grad_out_desc, statistics_desc = descs
    q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, grad_out_smem, statistics_smem = buffers
    keys_there, full, empty = barriers
    head, key_tile, _part, first, num_steps = place
    _num_keys, num_heads_kv, num_padded_rows = sizes
    STAGES: gl.constexpr = q_smem.shape[0]
    G: gl.constexpr = q_smem.shape[2]
    Q_TAIL_BYTES: gl.constexpr = 0 if q_tail_desc is None else q_tail_desc.block_type.nbytes
    K_TAIL_BYTES: gl.constexpr = 0 if k_tail_desc is None else k_tail_desc.block_type.nbytes
    if num_steps > 0:
        here, key = keys_there.index(0), key_tile * BLOCK_N
        mbarrier.expect(here, k_desc.block_type.nbytes + K_TAIL_BYTES + v_desc.block_type.nbytes)
        copy_rows(k_desc, k_tail_desc, key, head, here, k_smem, k_tail_smem, 0)
        tma.async_copy_global_to_shared(v_desc, [key, head, 0], here, v_smem.index(0))
    for step in range(num_steps):
        stage = step % STAGES
        row = first + step * BLOCK_M
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(
            ready,
            q_desc.block_type.nbytes + Q_TAIL_BYTES + grad_out_desc.block_type.nbytes
            + 3 * statistics_desc.block_type.nbytes,
        )  # fmt: skip
        copy_rows(q_desc, q_tail_desc, row // G, head * G, ready, q_smem, q_tail_smem, stage)
        tma.async_copy_global_to_shared(grad_out_desc, [row // G, head * G, 0], ready, grad_out_smem.index(stage))
        for plane in gl.static_range(3):
            at = (plane * num_heads_kv + head) * num_padded_rows + row
            tma.async_copy_global_to_shared(statistics_desc, [at], ready, statistics_smem.index(stage * 3 + plane))


@gluon.jit
def _keys_of(smem, WHICH: gl.constexpr):
    """The keys of one group of warps [GROUP_KEYS, columns]."""
    return tile(smem, 0, BLOCK_N).slice(WHICH * GROUP_KEYS, GROUP_KEYS)


@gluon.jit
def _sum_up(WHICH: gl.constexpr, buffers, barriers, place, mask, sizes, sums, softmax_scale):
    """Partial dK and dV of GROUP_KEYS keys."""
    q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, grad_out_smem, statistics_smem = buffers
    keys_there, full, empty = barriers
    head, key_tile, part, first, num_steps = place
    num_keys, num_heads_kv, _num_padded_rows = sizes
    grad_k_ptr, grad_v_ptr = sums
    STAGES: gl.constexpr = q_smem.shape[0]
    G: gl.constexpr = q_smem.shape[2]
    DK: gl.constexpr = q_smem.shape[3]
    DV: gl.constexpr = v_smem.shape[3]
    TAIL: gl.constexpr = q_tail_smem.shape[3] < DK
    WIDTH: gl.constexpr = DK + 64 if TAIL else DK
    dtype: gl.constexpr = q_smem.dtype
    ROWS: gl.constexpr = 32 if TAIL else BLOCK_M  # at a time: S and dP of more do not fit beside the sums
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    K_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    TAIL_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    V_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, V_SUMS, 2)
    k, k_tail, v = _keys_of(k_smem, WHICH), _keys_of(k_tail_smem, WHICH), _keys_of(v_smem, WHICH)
    first_key = key_tile * BLOCK_N + WHICH * GROUP_KEYS
    begin_ptr, end_ptr, tile_range_ptr, num_queries = mask
    num_groups = ceil_div(num_keys, GROUP_KEYS)
    ranges = tile_range_ptr + gl.minimum(2 * key_tile + WHICH, num_groups - 1)
    first_step = gl.minimum(gl.maximum(gl.load(ranges) * G - first, 0) // BLOCK_M, num_steps)
    stop_step = ceil_div(gl.maximum(gl.load(ranges + num_groups) * G - first, 0), BLOCK_M)
    stop_step = gl.maximum(gl.minimum(stop_step, num_steps), first_step)
    full_from = gl.load(ranges + 2 * num_groups) * G  # rows in [full_from, full_to) see all keys of this group
    full_to = gl.load(ranges + 3 * num_groups) * G
    mask = (begin_ptr, end_ptr, full_from, full_to, num_queries)
    nothing = gl.zeros([GROUP_KEYS, ROWS], gl.float32, SCORES)
    grad_k = gl.zeros([GROUP_KEYS, DK], gl.float32, K_SUMS)
    grad_k_tail = gl.zeros([GROUP_KEYS, 64], gl.float32, TAIL_SUMS)  # unused without a tail
    grad_v = gl.zeros([GROUP_KEYS, DV], gl.float32, V_SUMS)
    scale = softmax_scale * LOG2_E
    if num_steps > 0:
        mbarrier.wait(keys_there.index(0), 0)
    _pass_over(0, first_step, full, empty)
    for step in range(first_step, stop_step):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        q = tile(q_smem, stage, BLOCK_M)
        q_tail = tile(q_tail_smem, stage, BLOCK_M)
        grad_out = tile(grad_out_smem, stage, BLOCK_M)
        row = first + step * BLOCK_M
        for piece in gl.static_range(BLOCK_M // ROWS):
            q_rows = q.slice(piece * ROWS, ROWS)
            q_tail_rows = q_tail.slice(piece * ROWS, ROWS)
            grad_out_rows = grad_out.slice(piece * ROWS, ROWS)
            s = dot(k, k_tail, q_rows, q_tail_rows, nothing, TAIL)  # [GROUP_KEYS, ROWS]
            grad_p = warpgroup_mma(v, grad_out_rows.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            p = gl.exp2(gl.fma(s, scale, -_statistic(statistics_smem, stage * 3, piece * ROWS, SCORES)))
            p = _masked(p, row + piece * ROWS, first_key, mask, G)
            p = p * _statistic(statistics_smem, stage * 3 + 2, piece * ROWS, SCORES)
            grad_v = warpgroup_mma(gl.convert_layout(p.to(dtype), OPERAND), grad_out_rows, grad_v, is_async=True)
            grad_p = warpgroup_mma_wait(1, deps=[grad_p])
            grad_s = p * (grad_p - _statistic(statistics_smem, stage * 3 + 1, piece * ROWS, SCORES))
            grad_s = gl.convert_layout(grad_s.to(dtype), OPERAND)
            grad_k = warpgroup_mma(grad_s, q_rows, grad_k, is_async=True)
            if TAIL:
                grad_k_tail = warpgroup_mma(grad_s, q_tail_rows, grad_k_tail, is_async=True)
                grad_k, grad_k_tail, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_k_tail, grad_v])
            else:
                grad_k, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_v])
        mbarrier.arrive(empty.index(stage))
    _pass_over(stop_step, num_steps, full, empty)

    row = (part * num_keys).to(gl.int64)
    _store(grad_k_ptr, grad_k * softmax_scale, row, first_key, num_keys, head, num_heads_kv, WIDTH, 0)
    if TAIL:
        _store(grad_k_ptr, grad_k_tail * softmax_scale, row, first_key, num_keys, head, num_heads_kv, WIDTH, DK)
    _store(grad_v_ptr, grad_v, row, first_key, num_keys, head, num_heads_kv, DV, 0)


@gluon.jit
def _store(to_ptr, x, first_row, first_key, num_keys, head, num_heads_kv, WIDTH: gl.constexpr, FROM: gl.constexpr):
    """Sums of keys [GROUP_KEYS, columns] into columns FROM .. of rows of WIDTH numbers."""
    LAYOUT: gl.constexpr = x.type.layout
    key = first_key + gl.arange(0, GROUP_KEYS, gl.SliceLayout(1, LAYOUT))
    at = ((first_row + key) * num_heads_kv + head) * WIDTH
    at = gl.expand_dims(at, 1) + gl.expand_dims(FROM + gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    gl.store(to_ptr + at, x.to(to_ptr.dtype.element_ty), mask=gl.expand_dims(key < num_keys, 1))


@gluon.jit
def _pass_over(start, stop, full, empty):
    """Steps whose rows see no key of this group, but one of the other's."""
    STAGES: gl.constexpr = full.shape[0]
    for step in range(start, stop):
        mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
        mbarrier.arrive(empty.index(step % STAGES))


@gluon.jit
def _statistic(statistics_smem, index, FIRST: gl.constexpr, SCORES: gl.constexpr):
    """One number per row from row FIRST on, [1, ROWS]; loaded just before it is needed, for registers are scarce."""
    rows = statistics_smem.index(index).slice(FIRST, SCORES.instr_shape[1])
    return gl.expand_dims(rows.load(gl.SliceLayout(0, SCORES)), 0)


@gluon.jit
def _masked(p, first_row, first_key, mask, G: gl.constexpr):
    """`p` [keys, rows], 0 where the row does not see the key."""
    begin_ptr, end_ptr, full_from, full_to, num_queries = mask
    ROWS: gl.constexpr = p.shape[1]
    if (first_row < full_from) | (first_row + ROWS > full_to):
        row = first_row + gl.arange(0, ROWS, gl.SliceLayout(0, p.type.layout))
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
    num_queries, num_q_heads, dim_k = q.shape
    num_keys, num_kv_heads, dim_v = v.shape
    group = num_q_heads // num_kv_heads
    num_key_tiles = cdiv(num_keys, BLOCK_N.value)
    splits = num_splits(num_key_tiles * num_kv_heads)
    dtype = dtype or k.dtype
    parts_dtype = torch.float32 if splits > 1 else dtype
    grad_k = torch.empty(splits, *k.shape, dtype=parts_dtype, device=k.device)
    grad_v = torch.empty(splits, *v.shape, dtype=parts_dtype, device=k.device)
    rows, keys = (BLOCK_M.value // group, group), (BLOCK_N.value, 1)
    dk, dk_tail = split_head_dim(dim_k)
    _grad_kv_kernel[(num_key_tiles * num_kv_heads * splits,)](
        *descriptors(q, rows), *descriptors(k, keys), descriptor(v, (*keys, dim_v)),
        descriptor(grad_out, (*rows, dim_v)), descriptor(statistics.view(-1), (BLOCK_M.value,)),
        begin, end, tile_ranges(begin, end, num_keys, GROUP_KEYS.value),
        grad_k, grad_v,
        num_queries, statistics.shape[2], num_keys, num_kv_heads, softmax_scale,
        NUM_SPLITS=splits, STAGES=3, G=group, DK=dk, DK_TAIL=dk_tail, DV=dim_v, num_warps=4,
    )  # fmt: skip
    return (grad_k[0], grad_v[0]) if splits == 1 else sum_parts(grad_k, grad_v, dtype)
