"""Who chose each block: the inverse of `block_indices`, built on the device, deterministic, without a host wait.

A *list* is one (segment of queries, key-value head, block), numbered in that order; a segment is so many consecutive
queries that their rows stay in the L2 cache while all blocks meet them. An *entry* is one slot of `block_indices`,
numbered t * n + i inside its head. The index groups the entries of a chunk of queries by list, ascending in t, and
cuts long lists into *work items* of at most `item_queries` entries, so that a block chosen by everyone is shared out.

How     1. `mark` sets bit t of a bitmap [list, t] by atomic OR: the order of the ORs leaves no trace.
        2. `prefix` counts each list's bits up to every group of 256 queries.
        3. `scan` adds the counts up: where each list begins, and which work items it is cut into.
        4. `place` reads an entry's place off the bits before its own and writes it there: a stable counting sort. The
           first entry of an item names the item's list.
Memory  num_lists * T / 8 bytes for the bitmap, 1/8 of that for its prefix sums, and 4 bytes an entry.

Example, one segment, one head, n = 2, 4 blocks, item_queries = 2
    block_indices       t=0: 0 -1    t=1: 0 1    t=2: 0 2    t=3: 1 2        (an entry is t * 2 + i)
    entries             0 2 4 | 3 6 | 5 7                                    lists 0, 1, 2; list 3 is empty
    offsets             0 3 5 7 7
    item_offsets        0 2 3 4 4           list 0 is two items
    item_list           0 0 1 2             and room for 4 more
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, next_power_of_2

# Bits of the bitmap are counted in groups of 8 words: one 32-byte sector, 256 queries.
GROUP_WORDS = 8
GROUP_QUERIES = 32 * GROUP_WORDS
_ENTRIES_PER_PROGRAM = 512


@dataclass(frozen=True)
class BlockIndex:
    """The entries of a chunk of queries, grouped by list, and the work items the lists are cut into.

    entries         int32 [Hkv * T * n]         t * n + i; those of list x are entries[offsets[x] : offsets[x + 1]]
    offsets         int32 [num_lists + 1]
    item_offsets    int32 [num_lists + 1]       the items of list x are item_offsets[x] .. item_offsets[x + 1]
    item_list       int32 [max_items]           an item's list; only the first item_offsets[num_lists] are set
    item_queries    entries in an item, at most
    num_segments    num_lists = num_segments * Hkv * num_blocks
    """

    entries: Tensor
    offsets: Tensor
    item_offsets: Tensor
    item_list: Tensor
    item_queries: int
    num_segments: int

    @property
    def num_lists(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def max_items(self) -> int:
        return self.item_list.shape[0]


@triton.jit
def is_gathered(block, slot, own, GATHER_ALL: tl.constexpr):
    """Whether an entry goes through the index. `own` is the query's own block, -1 for a padding row.

    GATHER_ALL: every block the query may see. Otherwise only those that are neither the row's first nor among its
    last two: what is left is irregular, and wholly visible, so it needs no causal mask.
    """
    if GATHER_ALL:
        return (block >= 0) & (block <= own)
    else:
        return (block >= 0) & (block < own - 1) & (slot > 0)


@triton.jit
def _locate(
    block_indices, position, entry,
    num_entries, num_heads, num_blocks, segment_queries, stride_t, stride_h, stride_n,
    SLOTS: tl.constexpr, BLOCK_LEN: tl.constexpr, GATHER_ALL: tl.constexpr,
):  # fmt: skip
    """Entry number over all heads (t-major) -> list, query within its segment, t * n + i, whether it is indexed."""
    inside = entry < num_entries
    slot = entry % SLOTS
    head = (entry // SLOTS) % num_heads
    t = entry // (SLOTS * num_heads)
    at = t.to(tl.int64) * stride_t + head * stride_h + slot * stride_n
    block = tl.load(block_indices + at, mask=inside, other=-1)
    pos = tl.load(position + t, mask=inside, other=-1).to(tl.int32)
    own = tl.where(pos >= 0, pos // BLOCK_LEN, -1)
    gathered = inside & is_gathered(block, slot, own, GATHER_ALL)
    segment = t // segment_queries
    which = (segment * num_heads + head) * num_blocks + block
    return which, t - segment * segment_queries, t * SLOTS + slot, gathered


@triton.jit
def _popcount(x):
    """Set bits of each uint32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@launchable
@triton.jit(do_not_specialize=["num_entries", "num_heads", "num_blocks", "segment_queries", "num_words"])
def _mark_kernel(
    block_indices, position,
    bitmap,
    num_entries, num_heads, num_blocks, segment_queries, num_words, stride_t, stride_h, stride_n,
    SLOTS: tl.constexpr, BLOCK_LEN: tl.constexpr, GATHER_ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which, t, _, gathered = _locate(
        block_indices, position, entry,
        num_entries, num_heads, num_blocks, segment_queries, stride_t, stride_h, stride_n,
        SLOTS, BLOCK_LEN, GATHER_ALL,
    )  # fmt: skip
    bit = (tl.full([BLOCK], 1, tl.uint32) << (t % 32).to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_or(bitmap + which.to(tl.int64) * num_words + t // 32, bit, mask=gathered, sem="relaxed")


@launchable
@triton.jit(do_not_specialize=["num_groups"])
def _prefix_kernel(
    bitmap,
    prefix, counts,
    num_groups,
    GROUP_WORDS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """One list: prefix[g] = its set bits before group g, counts = all of them."""
    which = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, GROUP_WORDS)
    total = 0
    for first in range(0, num_groups, BLOCK_GROUPS):
        group = first + tl.arange(0, BLOCK_GROUPS)
        inside = group < num_groups
        at = (which * num_groups + group)[:, None] * GROUP_WORDS + word
        bits = tl.load(bitmap + at, mask=inside[:, None], other=0).to(tl.uint32, bitcast=True)
        count = tl.sum(_popcount(bits), 1)  # [BLOCK_GROUPS]
        tl.store(prefix + which * num_groups + group, total + tl.cumsum(count) - count, mask=inside)
        total += tl.sum(count)
    tl.store(counts + which, total)


@launchable
@triton.jit(do_not_specialize=["num_lists"])
def _scan_kernel(
    counts,
    offsets, item_offsets,
    num_lists,
    ITEM_QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the exclusive sums of the counts, and of the items they make."""
    entries, items = 0, 0
    for first in range(0, num_lists, BLOCK):
        which = first + tl.arange(0, BLOCK)
        count = tl.load(counts + which, mask=which < num_lists, other=0)
        share = (count + ITEM_QUERIES - 1) // ITEM_QUERIES
        tl.store(offsets + which, entries + tl.cumsum(count) - count, mask=which < num_lists)
        tl.store(item_offsets + which, items + tl.cumsum(share) - share, mask=which < num_lists)
        entries += tl.sum(count)
        items += tl.sum(share)
    tl.store(offsets + num_lists, entries)
    tl.store(item_offsets + num_lists, items)


@launchable
@triton.jit(do_not_specialize=["num_entries", "num_heads", "num_blocks", "segment_queries", "num_groups"])
def _place_kernel(
    block_indices, position, bitmap, prefix, offsets, item_offsets,
    entries, item_list,
    num_entries, num_heads, num_blocks, segment_queries, num_groups, stride_t, stride_h, stride_n,
    SLOTS: tl.constexpr, BLOCK_LEN: tl.constexpr, GATHER_ALL: tl.constexpr, BLOCK: tl.constexpr,
    GROUP_WORDS: tl.constexpr, ITEM_QUERIES: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which, t, name, gathered = _locate(
        block_indices, position, entry,
        num_entries, num_heads, num_blocks, segment_queries, stride_t, stride_h, stride_n,
        SLOTS, BLOCK_LEN, GATHER_ALL,
    )  # fmt: skip
    group = which.to(tl.int64) * num_groups + t // (32 * GROUP_WORDS)
    word = tl.arange(0, GROUP_WORDS)[None, :]
    bits = tl.load(bitmap + group[:, None] * GROUP_WORDS + word, mask=gathered[:, None], other=0)
    # Of the group's words count those before t's own wholly, t's own up to t, the later ones not at all.
    own_word = ((t // 32) % GROUP_WORDS)[:, None]
    below = (tl.full([BLOCK, 1], 1, tl.uint32) << (t % 32).to(tl.uint32)[:, None]) - 1
    keep = tl.where(word < own_word, 0xFFFFFFFF, tl.where(word == own_word, below, 0)).to(tl.uint32)
    rank = tl.sum(_popcount(bits.to(tl.uint32, bitcast=True) & keep), 1)
    rank += tl.load(prefix + group, mask=gathered, other=0)
    first = tl.load(offsets + which, mask=gathered, other=0)
    tl.store(entries + first + rank, name, mask=gathered)
    begins = gathered & (rank % ITEM_QUERIES == 0)
    item = tl.load(item_offsets + which, mask=begins, other=0) + rank // ITEM_QUERIES
    tl.store(item_list + item, which, mask=begins)


def build_block_index(
    block_indices: Tensor,
    position: Tensor,
    *,
    num_blocks: int,
    slc_block_len: int,
    item_queries: int,
    segment_queries: int,
    gather_all: bool,
) -> BlockIndex:
    """The index of a chunk: block_indices int32 [T, Hkv, n] (any strides), position integer [T].

    `gather_all=False` leaves out each row's first block, its own and the one before: see `is_gathered`.
    Entries of blocks that a query may not see (later than its own, or of a padding row) are left out always.
    """
    num_queries, num_heads, slots = block_indices.shape
    device = block_indices.device
    segment_queries = min(segment_queries, num_queries)
    num_segments = cdiv(num_queries, segment_queries)
    num_entries, num_lists = block_indices.numel(), num_segments * num_heads * num_blocks
    num_groups = cdiv(segment_queries, GROUP_QUERIES)
    # Every list ends in at most one short item, so this many always suffice; how many there are stays on the device.
    max_items = num_entries // item_queries + min(num_lists, num_entries)
    bitmap = torch.zeros(num_lists, num_groups * GROUP_WORDS, dtype=torch.int32, device=device)
    prefix = torch.empty(num_lists, num_groups, dtype=torch.int32, device=device)
    sizes = (num_lists, num_lists + 1, num_lists + 1, num_entries, max_items)
    counts, offsets, item_offsets, entries, item_list = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(
        sizes
    )

    grid = (cdiv(num_entries, _ENTRIES_PER_PROGRAM),)
    options = {
        "SLOTS": slots,
        "BLOCK_LEN": slc_block_len,
        "GATHER_ALL": gather_all,
        "BLOCK": _ENTRIES_PER_PROGRAM,
    }
    shape, strides = (num_entries, num_heads, num_blocks, segment_queries), block_indices.stride()
    _mark_kernel[grid](block_indices, position, bitmap, *shape, num_groups * GROUP_WORDS, *strides, **options)
    block_groups = min(128, next_power_of_2(num_groups))
    _prefix_kernel[(num_lists,)](bitmap, prefix, counts, num_groups, GROUP_WORDS, block_groups)
    block_lists = min(4096, next_power_of_2(num_lists))
    _scan_kernel[(1,)](counts, offsets, item_offsets, num_lists, item_queries, block_lists, num_warps=8)
    _place_kernel[grid](
        block_indices, position, bitmap, prefix, offsets, item_offsets,
        entries, item_list,
        *shape, num_groups, *strides, **options, GROUP_WORDS=GROUP_WORDS, ITEM_QUERIES=item_queries,
    )  # fmt: skip
    return BlockIndex(entries, offsets, item_offsets, item_list, item_queries, num_segments)
