"""Decoding with the kernels made for it: what the host does before a step, and the step, which a graph can hold.

    with decoding(cache, seqs, new):            host: pages for the new tokens, tables on the device
        decode_step(q, kv, gates, cache, slots) device: launches of fixed shape, no wait; may be a graph's replay

`attend.nsa_decode` is the two of them; `captured` has them for a whole model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from nsa_dist.branches import BranchKV
from nsa_dist.compress import BlockPlaces, PhiForm, compress_both
from nsa_dist.cp.device import put_on
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.storage import CacheShape
from nsa_kernels.decode_contracts import Appended, DecodeSizes, PagedCache

EMPTY_SLOT = -1


def has_kernels(ops: ModuleType, cache: NSACache) -> bool:
    """Whether `ops` has kernels for decoding that take this cache; else the operators of training decode."""
    shape = cache.shape
    takes = getattr(ops, "decode_takes", None)
    sizes = shape.head_dim_k, shape.head_dim_v, shape.cfg.slc_block_len
    return takes is not None and takes(cache.storage.dtype, *sizes)


@contextmanager
def decoding(cache: NSACache, seqs: Sequence[int], new: int) -> Iterator[None]:
    """Inside, `decode_step` may run once for `new` tokens of these sequences (-1: an empty slot), which they then have.

    The host waits for nothing. `CacheFullError` before anything is changed.
    """
    used = [seq for seq in seqs if seq != EMPTY_SLOT]
    with cache.appending(used, [new] * len(used)) as states:
        cache.tables.tell(states, cache.storage.num_rings)
        yield
    for state in states:
        state.told_length = state.length  # the step has taken the device's on


def slots_of(cache: NSACache, seqs: Sequence[int]) -> Tensor:
    """int32 [B] on the device: rows of the tables and rings of these sequences, -1 for empty slots."""
    rings = [EMPTY_SLOT if seq == EMPTY_SLOT else cache.state(seq).ring for seq in seqs]
    return put_on(cache.storage.device, torch.tensor(rings, dtype=torch.int32))


def paged(cache: NSACache) -> PagedCache:
    """The tensors of the cache, as kernels take them; addresses change when rings or tables grow."""
    storage, tables = cache.storage, cache.tables
    tensors = *storage.slc, *storage.cmp, *storage.win, *storage.raw, tables.page_table, tables.lengths
    return PagedCache(*tensors, storage.pages.k_scale, storage.pages.v_scale)


@torch.no_grad()
def decode_step(
    q: Tensor,
    kv: BranchKV,
    gates: Tensor,
    cache: NSACache,
    slots: Tensor,
    ops: ModuleType,
    softmax_scale: float | None = None,
    *,
    with_phi: bool = True,
) -> tuple[Tensor, Tensor]:
    """out [B, new, Hq, Dv] and block_indices [B, new, Hkv, n]; q, kv, gates as `nsa_decode` takes them.

    with_phi    False: no block becomes whole with these tokens, so that phi need not run
    """
    sizes, pages = sizes_of(cache.shape), paged(cache)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    with torch.autocast(q.device.type, enabled=False):
        if not with_phi:
            return ops.decode_append_and_attend(q, gates, kv, pages, slots, sizes=sizes, softmax_scale=scale)
        appended = ops.decode_append(*kv, pages, slots, sizes=sizes)
        compress_appended(appended, cache, pages, ops)
        return ops.decode_attention(q, gates, appended, pages, slots, sizes=sizes, softmax_scale=scale)


def compress_appended(appended: Appended, cache: NSACache, pages: PagedCache, ops: ModuleType) -> None:
    """phi of the blocks that have become whole: MLPs or means, turned, in one launch; other functions of all places."""
    phis, block_len = (cache.compress_k, cache.compress_v), cache.cfg.cmp_block_len
    forms = [form for phi in phis if (form := PhiForm.of(phi, block_len)) is not None]
    weights = [form.mlp for form in forms if form.mlp is not None]
    if len(weights) == 2:
        ops.decode_compress_mlp(appended, pages, *weights, *cache.turns)
    elif len(forms) == 2 and not weights:
        ops.decode_compress_mean(appended, pages, *cache.turns)
    else:
        at = BlockPlaces(appended.block_rows, appended.block_start, block_len)
        made = compress_both(phis, (appended.k_raw, appended.v_raw), at, ops)
        ops.decode_store(*made, appended, pages)


def sizes_of(shape: CacheShape) -> DecodeSizes:
    cfg = shape.cfg
    return DecodeSizes(
        cfg.cmp_block_len, cfg.cmp_stride, cfg.slc_block_len, cfg.num_slc_blocks, cfg.num_init_blocks,
        cfg.num_local_blocks, cfg.window_len,
    )  # fmt: skip


def any_whole(cache: NSACache, seqs: Sequence[int], new: int) -> bool:
    """Whether a compressed block becomes whole with the next `new` tokens of these sequences."""
    lengths = [cache.length(seq) for seq in seqs if seq != EMPTY_SLOT]
    count = cache.cfg.num_cmp_blocks
    return any(count(length) < count(length + new) for length in lengths)
