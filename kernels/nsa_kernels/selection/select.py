"""Which n blocks every query attends to: importance streamed from compressed scores, then the top n (section 3.3.2).

    imp[t, h, j] = sum_i w(i - j * S) * sum_g exp(softmax_scale * q[t, h*G + g] . k_cmp[i, h] - lse[t, h*G + g])

over the compressed blocks i that query t sees (eq. 8 to 10), where S = l' / d and w counts the stride-sized cells that
compressed block i shares with selection block j. Both are counted from the query's document: compressed block i is
row cmp_begin[t] + i of k_cmp.

Two kernels take turns on a chunk of queries, over one buffer of at most MAX_BUFFER_BYTES:
1. `select_importance`, or `hopper_importance` on Hopper GPUs: a tile of (queries x G heads) against compressed keys,
   probabilities in registers, weighed and added up over the S keys of a block and over the group. Keys i of block
   j = i // S also touch blocks j + 1, j + 2, ...: layer `o` of the buffer holds at [o, j] what the keys of block j give
   to block j + o. (l/d, S) = (2, 4) has two layers.
2. The top n of `sum_o buffer[o, j - o]`: one int64 per block, the bits of its importance above those of ~j, so that
   sorting integers prefers larger importance, then the lower index.

Example     l, d, l' = 32, 16, 64 and p = 1 everywhere on 8 compressed blocks: layer 0 holds 7, 7 (weights 2, 2, 2, 1),
            layer 1 holds 1, 1 (the last key of a block reaches into the next), so imp = 7, 8.
Shapes      T = query tokens here, M = compressed blocks of the whole sequence, n = num_slc_blocks
    q [T, Hq, Dk], k_cmp [M, Hkv, Dk]   bf16, fp16 or fp32      lse_cmp fp32 [T, Hq]      cmp_begin, cmp_end int32 [T]
    position, doc_start     int32 or int64 [T], in the padded stream; position < doc_start: padding, which chooses none
    returns                 int32 [T, Hkv, n], global block ids, ascending, -1 for none
Numerics    products of bf16 are exact in fp32; everything after the tensor cores is fp32. What a query chooses does not
            depend on the queries beside it.
Work        2 * Dk FLOP and one exp2 a visible (query, head, key)
Reference   nsa_kernels.reference.select_blocks
Source      Yuan et al. 2025, arXiv:2502.11089, eq. 8 to 12
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.hopper import hopper_takes
from nsa_kernels.common.rows import unit_stride
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.common.tiles import check_dtypes, check_intervals, copyable_by_tma
from nsa_kernels.selection import hopper_importance
from nsa_kernels.selection.importance import importance, interval

FAR = tl.constexpr(2**31 - 1)
INFINITY_BITS = tl.constexpr(0x7F800000)  # of fp32: more than any importance

MAX_BUFFER_BYTES = 2**28
MIN_PAIRS_ON_HOPPER = 2**26  # (query, key) pairs from which the Gluon kernel wins: 32,768 tokens


@triton.jit
def _top_kernel(
    imp_ptr, begin_ptr, end_ptr, position_ptr, doc_start_ptr,
    out_ptr,
    first_query, last_query, chunk_len, num_heads_kv, num_blocks,
    SLC_LEN: tl.constexpr, CELLS_SLC: tl.constexpr, NUM_LAYERS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr, NUM_CHOSEN_PAD: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, NUM_BUNDLES: tl.constexpr, BUNDLE: tl.constexpr,
):  # fmt: skip
    """The ids of the NUM_CHOSEN most important blocks of BLOCK_Q queries, ascending.

    Sorting is what costs. So blocks are bundled, BUNDLE neighbours at a time; the best K blocks lie in the K bundles
    whose best block is best (K others would be ahead of a block outside them), and only those bundles are sorted.
    """
    head = tl.program_id(0) % num_heads_kv
    query = first_query + tl.program_id(0) // num_heads_kv * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = query < last_query
    _, num_seen = interval(begin_ptr, end_ptr, query, last_query)
    num_scored = tl.cdiv(num_seen, CELLS_SLC)[:, None, None]  # blocks with a key that the query sees
    position = tl.load(position_ptr + query, mask=live, other=-1)
    doc_start = tl.load(doc_start_ptr + query, mask=live, other=0)
    own = tl.where(position >= doc_start, (position - doc_start) // SLC_LEN, -1).to(tl.int32)
    imp_rows = imp_ptr + (head.to(tl.int64) * chunk_len + query - first_query)[:, None, None] * NUM_LAYERS * num_blocks
    member = tl.arange(0, BUNDLE)[None, None, :]

    best = tl.full([BLOCK_Q, NUM_CHOSEN_PAD], -1, tl.int64)  # descending; -1: none
    for start in tl.range(0, tl.max(own) + 1, NUM_BUNDLES * BUNDLE):
        block = start + tl.arange(0, NUM_BUNDLES)[None, :, None] * BUNDLE + member
        packed = _packed_importance(
            imp_rows, block, num_scored, own[:, None, None], num_blocks, CELLS_SLC, NUM_LAYERS, NUM_INIT, NUM_LOCAL
        )  # [BLOCK_Q, NUM_BUNDLES, BUNDLE]
        best = _merge_sorted(best, tl.topk(tl.max(packed, 2), NUM_CHOSEN_PAD))

    bundle = tl.where(best >= 0, ((best & FAR) ^ FAR) // BUNDLE, FAR // BUNDLE).to(tl.int32)
    packed = _packed_importance(
        imp_rows, bundle[:, :, None] * BUNDLE + member, num_scored, own[:, None, None],
        num_blocks, CELLS_SLC, NUM_LAYERS, NUM_INIT, NUM_LOCAL,
    )  # fmt: skip
    best = tl.topk(tl.reshape(packed, [BLOCK_Q, NUM_CHOSEN_PAD * BUNDLE]), NUM_CHOSEN_PAD)

    rank = tl.arange(0, NUM_CHOSEN_PAD)[None, :]
    block = tl.where((best >= 0) & (rank < NUM_CHOSEN), (best & FAR).to(tl.int32) ^ FAR, FAR)
    block = tl.sort(block)  # the unchosen go last
    first_block = (doc_start // SLC_LEN).to(tl.int32)[:, None]
    ids = tl.where(block < FAR, block + first_block, -1)
    out_rows = out_ptr + ((query.to(tl.int64) * num_heads_kv + head) * NUM_CHOSEN)[:, None]
    tl.store(out_rows + rank, ids, mask=live[:, None] & (rank < NUM_CHOSEN))


@triton.jit
def _packed_importance(
    imp_rows, block, num_scored, own, num_blocks,
    CELLS_SLC: tl.constexpr, NUM_LAYERS: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
):  # fmt: skip
    """One int64 per block that orders them: the bits of its importance above those of ~block; -1 if it is not seen."""
    imp = tl.zeros(block.shape, tl.float32)
    for layer in tl.static_range(NUM_LAYERS):
        source = block - layer
        there = (source >= 0) & (source < num_scored) & (block <= own)
        imp += tl.load(imp_rows + layer * num_blocks + source, mask=there, other=0.0)
    forced = (block < NUM_INIT) | (block > own - NUM_LOCAL)
    bits = tl.where(forced, INFINITY_BITS, imp.to(tl.int32, bitcast=True))
    packed = (bits.to(tl.int64) << 32) | (block ^ FAR).to(tl.int64)
    return tl.where(block <= own, packed, -1)


@triton.jit
def _merge_sorted(a, b):
    """The larger half of two descending sequences, descending: max(a[i], b[K-1-i]) is bitonic (Batcher 1968)."""
    half = tl.maximum(a, tl.flip(b, 1))
    return tl.bitonic_merge(half, descending=True)


def _top_tile(num_blocks: int, chosen_pad: int, on_gpu: bool) -> dict[str, int]:
    """NUM_BUNDLES * BUNDLE blocks are looked at together, by one warp. The interpreter's time goes by programs.

    H200, 65,536 tokens, ms for 4, 8, 16 key-value heads: 64 * 4 0.78, -, 3.1;  128 * 4 0.88, 1.8, 3.5;
    64 * 8 1.04, 2.1, 4.2;  two queries to a warp 1.1. Sorting all blocks, 128 at a time: 1.7; 512 at a time: 3.6.
    """
    num_bundles = max(chosen_pad, min(64, next_power_of_2(max(1, num_blocks // 4))))
    return {"BLOCK_Q": 1 if on_gpu else 64, "NUM_BUNDLES": num_bundles, "BUNDLE": 4, "num_warps": 1}


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse_cmp: Tensor,
    cmp_begin: Tensor,
    cmp_end: Tensor,
    position: Tensor,
    doc_start: Tensor,
    *,
    softmax_scale: float,
    cmp_block_len: int,
    cmp_stride: int,
    slc_block_len: int,
    num_slc_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
) -> Tensor:
    """The n selection blocks of every query and key-value head, forced ones included, ascending, -1 for none.

    Forced: the document's first `num_init_blocks` and the last `num_local_blocks` up to the query's own. Among the
    others larger importance wins, ties go to the lower index. No gradient passes.

    returns block_indices int32 [T, Hkv, n], global block ids
    raises ValueError on shapes, dtypes and block lengths that do not fit together
    """
    _check(q, k_cmp, lse_cmp, cmp_begin, cmp_end, position, doc_start, softmax_scale)
    _check_block_lengths(cmp_block_len, cmp_stride, slc_block_len)
    begin, end, position, doc_start = (t.contiguous() for t in (cmp_begin, cmp_end, position, doc_start))
    num_queries = q.shape[0]
    num_keys, num_kv_heads = k_cmp.shape[:2]
    cells_cmp, cells_slc = cmp_block_len // cmp_stride, slc_block_len // cmp_stride
    num_layers = 1 + cdiv(cells_cmp - 1, cells_slc)
    num_blocks = cdiv(num_keys, cells_slc)
    chosen_pad = max(2, next_power_of_2(num_slc_blocks))
    top_tile = _top_tile(num_blocks, chosen_pad, q.is_cuda)

    keys = unit_stride(k_cmp)
    fill: Callable[..., None] = importance
    if _large_on_hopper(q, k_cmp, cells_slc):
        keys, fill = hopper_importance.boxes_of_blocks(k_cmp, cells_slc), hopper_importance.importance
    q = copyable_by_tma(q)
    row_bytes = 4 * num_kv_heads * num_layers * max(1, num_blocks)
    chunk_len = max(1, MAX_BUFFER_BYTES // row_bytes)
    chunk_len = min(num_queries, chunk_len // 128 * 128 or chunk_len)  # whole tiles of queries, if there is room
    buffer = q.new_empty(num_kv_heads, chunk_len, num_layers, num_blocks, dtype=torch.float32)
    out = torch.empty(num_queries, num_kv_heads, num_slc_blocks, dtype=torch.int32, device=q.device)
    for first in range(0, num_queries, max(1, chunk_len)):
        last = min(first + chunk_len, num_queries)
        if num_keys:
            fill(
                q, keys, lse_cmp, begin, end, buffer, first, last,
                softmax_scale=softmax_scale, cells_cmp=cells_cmp, cells_slc=cells_slc,
            )  # fmt: skip
        _top_kernel[(cdiv(last - first, top_tile["BLOCK_Q"]) * num_kv_heads,)](
            buffer, begin, end, position, doc_start,
            out,
            first, last, chunk_len, num_kv_heads, num_blocks,
            SLC_LEN=slc_block_len, CELLS_SLC=cells_slc, NUM_LAYERS=num_layers,
            NUM_CHOSEN=num_slc_blocks, NUM_CHOSEN_PAD=chosen_pad, NUM_INIT=num_init_blocks, NUM_LOCAL=num_local_blocks,
            **top_tile,
        )  # fmt: skip
    return out


def _large_on_hopper(q: Tensor, k_cmp: Tensor, cells_slc: int) -> bool:
    """Whether the Gluon kernel takes these and is faster; the bits are the same either way.

    H200, bf16, Hq 64, Hkv 4, D 128, ms of the importances: 64k tokens 4.1 against 5.9, 8k tokens, with an older form,
    0.40 against 0.16. Other groups were not timed. Fewer than 4 keys to a block need more shared memory than there is.
    """
    is_large = q.shape[0] * k_cmp.shape[0] >= MIN_PAIRS_ON_HOPPER and q.shape[1] // k_cmp.shape[1] >= 8
    return is_large and cells_slc in (4, 8, 16) and hopper_takes(q, k_cmp)


def _check(q, k_cmp, lse_cmp, begin, end, position, doc_start, softmax_scale) -> None:
    if k_cmp.shape[1] == 0 or q.shape[1] % k_cmp.shape[1] or q.shape[2] != k_cmp.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and k_cmp {tuple(k_cmp.shape)} do not fit: the key-value heads must divide the query "
            f"heads, and both need one head dim"
        )
    check_dtypes(q=q, k_cmp=k_cmp)
    check_intervals(q, begin, end, softmax_scale)
    if lse_cmp.shape != q.shape[:2] or lse_cmp.dtype != torch.float32:
        raise ValueError(
            f"lse_cmp {lse_cmp.dtype} {tuple(lse_cmp.shape)} must be the float32 [T, Hq] = {list(q.shape[:2])} that "
            f"compressed_attention returned for the same q, or probabilities do not add up to one; pass that one"
        )
    if position.shape != q.shape[:1] or doc_start.shape != q.shape[:1]:
        raise ValueError(
            f"position {tuple(position.shape)} and doc_start {tuple(doc_start.shape)} must be [T] = [{q.shape[0]}], "
            f"one place in the padded stream per query; expand doc_start to one entry per token"
        )


def _check_block_lengths(cmp_block_len: int, cmp_stride: int, slc_block_len: int) -> None:
    for name, length in (("cmp_block_len", cmp_block_len), ("slc_block_len", slc_block_len)):
        if length % cmp_stride:
            raise ValueError(
                f"{name}={length} must be a multiple of cmp_stride={cmp_stride}, so that importance is counted in "
                f"whole strides; take {name}={cdiv(length, cmp_stride) * cmp_stride}"
            )
