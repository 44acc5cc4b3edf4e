"""A decoding step over ranks by kernels: launches of fixed shape and all-gathers, which a CUDA graph can hold.

    with decoding(cache, seqs, new):                host: pages for the new tokens, tables on the device
        decode_step(q, kv, gates, cache, slots, comm, ...)      device; may be a graph's replay

The order of things is that of the head of this folder. `nsa_decode` takes it where there are kernels.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from nsa_dist.branches import BranchKV
from nsa_dist.compress import BlockPlaces, compress_both
from nsa_dist.cp.comm import Comm
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.decode import any_whole, compress_appended, decoding, paged, sizes_of, slots_of
from nsa_dist.inference.decode import has_kernels as takes_whole
from nsa_dist.inference.over_ranks.partials import checksum, gather_checked
from nsa_dist.inference.over_ranks.storage import RankStorage, placement_over, spread
from nsa_dist.inference.over_ranks.tables import RankTables
from nsa_kernels.decode_contracts import Appended, PagedCache
from nsa_kernels.decode_part.part import CachePart, TokenPart


def has_kernels(ops: ModuleType, cache: NSACache, cp_size: int) -> bool:
    """Whether `ops` has kernels for a rank's part of this cache; else the operators of training decode."""
    shape, takes = cache.shape, getattr(ops, "part_takes", None)
    if takes is None or placement_over(cache, cp_size) == "replicated":
        return takes is not None and takes_whole(ops, cache)
    return takes(cache.storage.dtype, shape.head_dim_k, shape.head_dim_v, sizes_of(shape))


def decode(
    q: Tensor, kv: BranchKV, gates: Tensor, cache: NSACache, seqs: Sequence[int], comm: Comm, ops: ModuleType,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`decode_step` for the next tokens of these sequences, which are told to the tables before."""
    spread(cache, comm)
    new = q.shape[1]
    with_phi = any_whole(cache, seqs, new)
    with decoding(cache, seqs, new):
        slots = slots_of(cache, seqs)
        return decode_step(q, kv, gates, cache, slots, comm, ops, softmax_scale, with_phi=with_phi)


@torch.no_grad()
def decode_step(
    q: Tensor, kv: BranchKV, gates: Tensor, cache: NSACache, slots: Tensor, comm: Comm, ops: ModuleType,
    softmax_scale: float | None = None, *, with_phi: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `nsa_dist.inference.decode.decode_step`, on a cache that lies over the ranks of `comm`: the same on all."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    assert isinstance(cache.storage, RankStorage)
    attend = _replicated if cache.storage.is_replicated else _sharded
    with torch.autocast(q.device.type, enabled=False):
        appended = ops.decode_append(*kv, paged(cache), slots, sizes=sizes_of(cache.shape))
        return attend(q, kv, gates, cache, appended, slots, comm, ops, scale, with_phi)


def _replicated(
    q: Tensor, kv: BranchKV, gates: Tensor, cache: NSACache, appended: Appended, slots: Tensor, comm: Comm,
    ops: ModuleType, scale: float, with_phi: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank chooses alone."""
    assert isinstance(cache.tables, RankTables)
    sizes, part = sizes_of(cache.shape), TokenPart(paged(cache), cache.tables.cmp_table)
    if with_phi:
        cells = ops.all_cells(appended, part, slots, q.shape[1], sizes=sizes)
        compress_appended(cells, cache, part.whole, ops)
    step = ops.TokenPartAttention(q, gates, appended, part, slots, sizes=sizes, softmax_scale=scale)
    told = _told(q, kv, gates, part.cache, slots)
    return step.combine(gather_checked(step.partials, told, "partials", comm))


def _sharded(
    q: Tensor, kv: BranchKV, gates: Tensor, cache: NSACache, appended: Appended, slots: Tensor, comm: Comm,
    ops: ModuleType, scale: float, with_phi: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ranks choose together."""
    sizes, part = sizes_of(cache.shape), part_of(cache)
    if with_phi:
        _compress(appended, cache, part, slots, q.shape[1], ops)
    step = ops.PartAttention(q, gates, appended, part, slots, sizes=sizes, softmax_scale=scale)
    lses = gather_checked(step.lse, _told(q, kv, gates, part.cache, slots), "lse", comm)
    candidates = comm.all_gather(step.candidates(lses), "candidates")
    return step.combine(comm.all_gather(step.attend(candidates), "partials"))


def part_of(cache: NSACache) -> CachePart:
    """The tensors of this rank where compressed rows are sharded, as kernels take them; addresses change when rings or
    tables grow."""
    storage, tables = cache.storage, cache.tables
    assert isinstance(storage, RankStorage)
    assert isinstance(tables, RankTables)
    following = storage.following[0] if storage.following else storage.cmp.k  # no block reaches into the next page
    return CachePart(paged(cache), tables.first, following, tables.following_table, storage.cp_size)


def _compress(
    appended: Appended, cache: NSACache, part: CachePart, slots: Tensor, new: int, ops: ModuleType
) -> None:  # fmt: skip
    """phi of the blocks that have become whole, on every rank."""
    at = BlockPlaces(appended.block_rows, appended.block_start, cache.cfg.cmp_block_len)
    made = compress_both((cache.compress_k, cache.compress_v), (appended.k_raw, appended.v_raw), at, ops)
    ops.part_store(*made, appended, part, slots, new, sizes=sizes_of(cache.shape))


def _told(q: Tensor, kv: BranchKV, gates: Tensor, pages: PagedCache, slots: Tensor) -> Tensor:
    """What ranks compare: nothing on a GPU, where the host would have to wait."""
    if q.is_cuda:
        return slots.new_empty(0, dtype=torch.int64)
    lengths = pages.lengths.index_select(0, slots.clamp(min=0))
    return torch.cat([slots.long(), lengths.long(), checksum([q, *kv, gates])])
