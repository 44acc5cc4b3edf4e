"""Rows for the operators: new tokens behind those that rings hold, fresh compressed blocks, the chosen pages."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsa_dist.branches import BranchKV
from nsa_dist.compress import BlockPlaces, compress_both
from nsa_dist.config import NSAConfig
from nsa_dist.cp.pages import QueryBlocks, short_option, short_rows_of
from nsa_dist.cp.plan import runs
from nsa_dist.inference.cache import NSACache, SequenceState
from nsa_dist.inference.places import Extended, Places
from nsa_dist.inference.storage import Pair


def compress_fresh(new: Pair, cache: NSACache, at: Places, ops: ModuleType) -> None:
    """phi of the blocks that have become whole, into their pages."""
    if len(at.fresh_slots):
        cache.storage.write_pages(cache.storage.cmp, at.fresh_slots, compressed(new, cache, at, ops))


def compressed(new: Pair, cache: NSACache, at: Places, ops: ModuleType) -> Pair:
    """phi of the blocks that have become whole: [F, Hkv, D]."""
    rows = extended(new, cache.storage.raw, at.raw)
    block_places = BlockPlaces(at.fresh_rows, at.fresh_start, cache.cfg.cmp_block_len)
    return Pair(*compress_both((cache.compress_k, cache.compress_v), (rows.k, rows.v), block_places, ops))


def extended(new: Pair, rings: Pair, at: Extended) -> Pair:
    """The rows that `at` describes; those that are no token's are zero."""
    if at.num_rows == len(new.k):
        return new
    old = rings.read(at.ring_rows)

    def put(x: Tensor, before: Tensor) -> Tensor:
        rows = x.new_zeros(at.num_rows, *x.shape[1:])
        return rows.index_copy_(0, at.ring_to, before).index_copy_(0, at.new_to, x)

    return Pair(put(new.k, old.k), put(new.v, old.v))


def chosen_blocks(
    q: Tensor, keys: Tensor, lse: Tensor, cache: NSACache, at: Places, ops: ModuleType, softmax_scale: float
) -> Tensor:
    """block_indices [Q, Hkv, n], ids in the stream, of query rows that have attended to the compressed `keys`."""
    cfg = cache.cfg
    return ops.select_blocks(
        q, keys, lse, at.cmp_begin, at.cmp_end, at.position, at.doc_start, softmax_scale=softmax_scale,
        cmp_block_len=cfg.cmp_block_len, cmp_stride=cfg.cmp_stride, slc_block_len=cfg.slc_block_len,
        num_slc_blocks=cfg.num_slc_blocks, num_init_blocks=cfg.num_init_blocks, num_local_blocks=cfg.num_local_blocks,
    )  # fmt: skip


def in_sequence(block_indices: Tensor, at: Places, block_len: int) -> Tensor:
    """Ids in the stream -> in each sequence; -1 for none."""
    first = torch.div(at.doc_start, block_len, rounding_mode="floor")[:, None, None]
    return torch.where(block_indices >= 0, block_indices - first, -1)


def chosen_pages(cache: NSACache, block_page: Tensor, block_indices: Tensor) -> tuple[Pair, Tensor]:
    """Rows that hold the chosen blocks, whole pages, and the table from a block of the stream to its page there.

    On a GPU the whole pool, as it lies. The operators for CPUs look at all the rows that they are given, so they are
    given the chosen pages only; so are those of a GPU where pages are of 8 bits, which must be widened.

    block_page      int64 [blocks of the stream]: their pages
    """
    storage = cache.storage
    if block_indices.is_cuda and not storage.pages.is_fp8:
        pages, table = storage.slc.flat(), block_page
    else:
        chosen = block_indices.unique()
        chosen = chosen[chosen >= 0].long()
        index = block_page[chosen]
        pages = storage.widened(Pair(*(x.index_select(0, index).flatten(0, 1) for x in storage.slc)))
        places = torch.arange(len(chosen), device=chosen.device)
        table = torch.full_like(block_page, -1).index_copy_(0, chosen, places)
    return pages, table.to(torch.int32).expand(cache.shape.num_kv_heads, -1).contiguous()


def write_rings(kv: BranchKV, cache: NSACache, at: Places) -> None:
    """The last of the new tokens into the rings, once nothing reads what was there."""
    for ring, new, kept in (
        (cache.storage.win, Pair(kv.k_win, kv.v_win), at.win),
        (cache.storage.raw, Pair(kv.k_cmp, kv.v_cmp), at.raw),
    ):
        ring.write(kept.kept_to, Pair(*(x.index_select(0, kept.kept) for x in new)))


def short_prefill(
    states: Sequence[SequenceState], added: Sequence[int], at: Places, cfg: NSAConfig, ops: ModuleType
) -> dict[str, Any]:
    """The option of the short way (`nsa_dist.cp.pages`), of query rows in whole blocks, as training's are."""
    length = cfg.slc_block_len
    start, count = torch.tensor([state.length for state in states]), torch.tensor(added)
    end = start + count
    num_blocks = torch.where(count > 0, (end + length - 1) // length - start // length, 0)
    num_pages = torch.tensor([len(state.pages) for state in states])
    sequence = torch.arange(len(states)).repeat_interleave(num_blocks)
    number = runs(start // length, num_blocks)
    position = number[:, None] * length + torch.arange(length)
    visible = (position >= start[sequence, None]) & (position < end[sequence, None])
    first_block = (num_pages.cumsum(0) - num_pages)[sequence]
    queries = QueryBlocks(sequence, first_block, number, visible)
    return short_option(short_rows_of(queries, at.position, cfg, ops))
