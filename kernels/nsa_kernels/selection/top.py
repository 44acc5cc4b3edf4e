"""The n blocks of every query with the largest importance, in plain Triton, from the layers that importance left.

The importance of block j is `sum_o buffer[o, j - o]`; see `select`.
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.contracts import SelectionCall
from nsa_kernels.selection.importance import interval
from nsa_kernels.selection.tiles import top_tile

FAR = tl.constexpr(2**31 - 1)
INFINITY_BITS = tl.constexpr(0x7F800000)  # of fp32: more than any importance


@launchable
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
    rank = tl.arange(0, NUM_CHOSEN_PAD)[None, :]
    first_block = (doc_start // SLC_LEN).to(tl.int32)[:, None]
    out_rows = out_ptr + ((query.to(tl.int64) * num_heads_kv + head) * NUM_CHOSEN)[:, None]
    stored = live[:, None] & (rank < NUM_CHOSEN)
    if tl.max(own) < NUM_CHOSEN:  # all that they see
        tl.store(out_rows + rank, tl.where(rank <= own[:, None], first_block + rank, -1), mask=stored)
        return

    imp_rows = imp_ptr + (head.to(tl.int64) * chunk_len + query - first_query)[:, None, None] * NUM_LAYERS * num_blocks
    member = tl.arange(0, BUNDLE)[None, None, :]

    best = tl.full([BLOCK_Q, NUM_CHOSEN_PAD], -1, tl.int64)  # descending; -1: none
    for start in tl.range(0, tl.max(own) + 1, NUM_BUNDLES * BUNDLE):
        block = start + tl.arange(0, NUM_BUNDLES)[None, :, None] * BUNDLE + member
        packed = _packed_importance(
            imp_rows, block, num_scored, own[:, None, None], num_blocks, CELLS_SLC, NUM_LAYERS, NUM_INIT, NUM_LOCAL
        )  # [BLOCK_Q, NUM_BUNDLES, BUNDLE]
        best = merge_sorted(best, tl.topk(tl.max(packed, 2), NUM_CHOSEN_PAD))

    bundle = tl.where(best >= 0, ((best & FAR) ^ FAR) // BUNDLE, FAR // BUNDLE).to(tl.int32)
    packed = _packed_importance(
        imp_rows, bundle[:, :, None] * BUNDLE + member, num_scored, own[:, None, None],
        num_blocks, CELLS_SLC, NUM_LAYERS, NUM_INIT, NUM_LOCAL,
    )  # fmt: skip
    best = tl.topk(tl.reshape(packed, [BLOCK_Q, NUM_CHOSEN_PAD * BUNDLE]), NUM_CHOSEN_PAD)

    block = tl.where((best >= 0) & (rank < NUM_CHOSEN), (best & FAR).to(tl.int32) ^ FAR, FAR)
    block = tl.sort(block)  # the unchosen go last
    tl.store(out_rows + rank, tl.where(block < FAR, block + first_block, -1), mask=stored)


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
def merge_sorted(a, b):
    """The larger half of two descending sequences, descending: max(a[i], b[K-1-i]) is bitonic (Batcher 1968)."""
    half = tl.maximum(a, tl.flip(b, 1))
    return tl.bitonic_merge(half, descending=True)


def choose_top(call: SelectionCall, buffer: Tensor, out: Tensor, first: int, last: int) -> None:
    """Writes `out` for the queries [first, last), whose importances the buffer holds; tensors per query contiguous."""
    num_kv_heads, chunk_len, num_layers, num_blocks = buffer.shape
    chosen_pad = max(2, next_power_of_2(call.num_slc_blocks))
    tile = top_tile(num_blocks, chosen_pad, buffer.is_cuda)
    _top_kernel[(cdiv(last - first, tile["BLOCK_Q"]) * num_kv_heads,)](
        buffer, call.cmp_begin, call.cmp_end, call.position, call.doc_start,
        out,
        first, last, chunk_len, num_kv_heads, num_blocks,
        SLC_LEN=call.slc_block_len, CELLS_SLC=call.slc_block_len // call.cmp_stride, NUM_LAYERS=num_layers,
        NUM_CHOSEN=call.num_slc_blocks, NUM_CHOSEN_PAD=chosen_pad,
        NUM_INIT=call.num_init_blocks, NUM_LOCAL=call.num_local_blocks,
        **tile,
    )  # fmt: skip
