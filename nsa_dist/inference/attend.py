"""New tokens of many sequences attend to the cache, with the operators of training.

    k_slc, v_slc --> pages          k_cmp, v_cmp --ring, new--> phi, where a block has become whole --> pages
    compressed attention --softmax_lse--> selection --> selected attention, from the chosen pages
    k_win, v_win --ring, new--> window attention                    and at the end the rings take what is new

`nsa_prefill` cuts tiles where training does; `nsa_decode` takes a row for each token. Nothing else differs. Where there
are kernels made for decoding (`decode`), `nsa_decode` takes those.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from operator import index
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.attention import check_inputs, check_plan
from nsa_dist.branches import BranchKV
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.plan import ShardPlan, as_bounds
from nsa_dist.inference import over_ranks
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.decode import EMPTY_SLOT, any_whole, decode_step, decoding, has_kernels, slots_of
from nsa_dist.inference.places import Places, places
from nsa_dist.inference.rows import (
    chosen_blocks,
    chosen_pages,
    compress_fresh,
    extended,
    in_sequence,
    short_prefill,
    write_rings,
)
from nsa_dist.inference.storage import MOST_BACK, Pair
from nsa_dist.operators import Tiles, default_ops


def nsa_prefill(
    q: Tensor,
    kv: BranchKV,
    gates: Tensor,
    cache: NSACache,
    seqs: Sequence[int],
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    plan: ShardPlan | None = None,
    cp_group: dist.ProcessGroup | Comm | None = None,
    ops: ModuleType | None = None,
    softmax_scale: float | None = None,
    return_block_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append the next chunk of each sequence, packed, and attend to all that the cache has of it.

    q, kv, gates    as `nsa_attention` takes them, T tokens; RoPE applied at the position in the sequence, which begins
                    at `cache.length(seq)`
    seqs            ids of distinct sequences
    cu_seqlens      [len(seqs) + 1], where chunks begin and end in the pack; None: one sequence, or the plan's. A chunk
                    may be empty
    plan, cp_group  both given: q, kv and gates are `plan.shard(..., rank)` of the packed chunks, out is too, and the
                    cache lies over the ranks of the group, as its first call of more than one rank makes it
    ops, softmax_scale      as `nsa_attention`
    returns         out [T, Hq, Dv]; with return_block_indices also int32 [T, Hkv, n], blocks of each sequence from 0

    Whatever the chunks, results are those of `nsa_attention` on the whole sequence: of whole sequences and first chunks
    bit for bit, and of later ones as far as the operators give a query the same bits in any company. No gradient.
    Over ranks first chunks of all the sequences go through `nsa_attention` with the plan; later ones are gathered on
    every rank, so their memory grows with the chunk there.

    Raises ValueError for what does not fit together, for unknown or freed ids, and for a cache that lies over another
    group, or whole. `CacheFullError` on all ranks, before anything is written.
    """
    check_inputs(q, kv, gates, softmax_scale)
    _check_cache(q, kv, cache)
    comm = _ranks(cache, plan, cp_group, needs_plan=True)
    if plan is not None:
        check_plan(q, plan, cu_seqlens, comm)
        bounds, num_tokens = plan.cu_seqlens, plan.num_tokens
    else:
        bounds, num_tokens = as_bounds([0, len(q)] if cu_seqlens is None else cu_seqlens), len(q)
    added = [stop - start for start, stop in pairwise(bounds)]
    if len(added) != len(seqs) or bounds[0] != 0 or bounds[-1] != num_tokens or min(added, default=0) < 0:
        raise ValueError(
            f"cu_seqlens={list(bounds)} must rise from 0 to the {num_tokens} tokens of q, with one chunk for each of "
            f"the {len(seqs)} sequences; pass [0, length of the first chunk, ...], {len(seqs) + 1} numbers"
        )
    seqs = [index(seq) for seq in seqs]
    _check_distinct(seqs)
    ops = ops or default_ops(q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    call = functools.partial(_append, cache=cache, seqs=seqs, added=added, ops=ops, scale=scale, comm=comm)
    if plan is None:
        out, block_indices = call(q, kv, gates, is_prefill=True)
    elif comm.size > 1 and all(cache.length(seq) == 0 for seq in seqs):
        out, block_indices = over_ranks.first_chunks(q, kv, gates, cache, seqs, plan, comm, ops, scale)
    else:
        whole = over_ranks.gathered([q, *kv, gates], plan, comm)
        out, block_indices = over_ranks.own_rows(
            call(whole[0], BranchKV(*whole[1:7]), whole[7], is_prefill=True), plan, comm
        )
    return (out, block_indices) if return_block_indices else out


def nsa_decode(
    q: Tensor,
    kv: BranchKV,
    gates: Tensor,
    cache: NSACache,
    seqs: Sequence[int],
    *,
    plan: ShardPlan | None = None,
    cp_group: dist.ProcessGroup | Comm | None = None,
    ops: ModuleType | None = None,
    softmax_scale: float | None = None,
    return_block_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append 1 to 8 new tokens to each of B sequences of any lengths, and attend to all that the cache has of each.

    q               [B, new, Hq, Dk]; kv six of [B, new, Hkv, Dk or Dv]; gates [B, new, Hq, 3]; otherwise as
                    `nsa_prefill`. New token i of a sequence is at position `cache.length(seq) + i`
    seqs            B ids of distinct sequences; -1: an empty slot, whose output is 0 and whose blocks are -1
    cp_group        of a cache over ranks. All that is given must be the same on every rank, bit for bit, and so is what
                    is returned: each rank appends to its own window and compresses for itself. On CPUs it is compared;
                    on a GPU the host would have to wait for that, and nothing is compared
    plan            pages do not lie by it: its cp_size must be the group's, and no more is asked of it
    returns         out [B, new, Hq, Dv]; with return_block_indices also int32 [B, new, Hkv, n]

    On a GPU through kernels of its own, `nsa_kernels.decode`; on CPUs, in fp64 and with `ops` that have none, through
    the operators of training. The same blocks, but for ties of importances within rounding; the host does not wait.
    Raises as `nsa_prefill`.
    """
    comm = _ranks(cache, plan, cp_group, needs_plan=False)
    _check_batch(q, kv, gates, seqs)
    batch, new = q.shape[:2]
    packed = [x.flatten(0, 1) for x in (q, *kv, gates)]
    check_inputs(packed[0], BranchKV(*packed[1:7]), packed[7], softmax_scale)
    _check_cache(packed[0], BranchKV(*packed[1:7]), cache)
    seqs = [index(seq) for seq in seqs]
    used = [slot for slot, seq in enumerate(seqs) if seq != EMPTY_SLOT]
    taken = [seqs[slot] for slot in used]
    _check_distinct(taken)
    ops = ops or default_ops(q)
    if comm.size == 1 and has_kernels(ops, cache):
        with_phi = any_whole(cache, seqs, new)
        with decoding(cache, seqs, new):
            results = decode_step(q, kv, gates, cache, slots_of(cache, seqs), ops, softmax_scale, with_phi=with_phi)
        return results if return_block_indices else results[0]
    if comm.size > 1 and taken and over_ranks.has_kernels(ops, cache, comm.size):
        results = over_ranks.decode(q, kv, gates, cache, seqs, comm, ops, softmax_scale)
        return results if return_block_indices else results[0]
    if len(used) < batch:
        slots = torch.tensor(used, dtype=torch.int64, device=q.device)
        packed = [x.index_select(0, slots).flatten(0, 1) for x in (q, *kv, gates)]
    results = _append(
        packed[0], BranchKV(*packed[1:7]), packed[7], cache, taken, [new] * len(taken), ops,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, comm, is_prefill=False,
    )  # fmt: skip
    out, block_indices = (x.unflatten(0, (len(used), new)) for x in results)
    if len(used) < batch:
        out = out.new_zeros(batch, *out.shape[1:]).index_copy_(0, slots, out)
        block_indices = block_indices.new_full((batch, *block_indices.shape[1:]), -1).index_copy_(
            0, slots, block_indices
        )
    return (out, block_indices) if return_block_indices else out


@torch.no_grad()
def _append(
    q: Tensor, kv: BranchKV, gates: Tensor, cache: NSACache, seqs: Sequence[int], added: Sequence[int],
    ops: ModuleType, scale: float, comm: Comm, *, is_prefill: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [T, Hq, Dv] and block_indices [T, Hkv, n] of packed new tokens."""
    shape, storage = cache.shape, cache.storage
    if not len(q):
        for seq in seqs:
            cache.state(seq)
        return q.new_zeros(0, q.shape[1], shape.head_dim_v), _no_blocks(q, cache)
    if comm.size > 1:
        return over_ranks.append(q, kv, gates, cache, seqs, added, ops, scale, comm)
    with cache.appending(seqs, added) as states, torch.autocast(q.device.type, enabled=False):
        tiles = _tiles(ops, q, cache, len(seqs), is_prefill)
        at = places(states, added, shape, q.device, aligned=is_prefill, key_alignment=tiles.key_alignment)
        storage.write_pages(storage.slc, at.new_slots, Pair(kv.k_slc, kv.v_slc))
        compress_fresh(Pair(kv.k_cmp, kv.v_cmp), cache, at, ops)
        window = extended(Pair(kv.k_win, kv.v_win), storage.win, at.win)
        queries, weights = _padded(q, at), _padded(gates, at)
        short = short_prefill(states, added, at, cache.cfg, ops) if is_prefill else {}
        out, block_indices = _attend(queries, weights, window, cache, at, ops, scale, tiles, short)
        if at.token_rows is not None:
            out, block_indices = (x.index_select(0, at.token_rows) for x in (out, block_indices))
        write_rings(kv, cache, at)
    return out, block_indices.to(torch.int32)


def _attend(
    q: Tensor, gates: Tensor, window: Pair, cache: NSACache, at: Places, ops: ModuleType, scale: float, tiles: Tiles,
    short: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of all query rows [Q]: the gated sum of the branches, and the chosen blocks of each sequence from 0."""
    cfg = cache.cfg
    compressed, seen = _compressed(cache, at), (at.cmp_begin, at.cmp_end)
    out_cmp, lse = ops.compressed_attention(q, *compressed, *seen, softmax_scale=scale, **tiles.options)
    block_indices = chosen_blocks(q, compressed.k, lse, cache, at, ops, scale)
    pages, block_table = chosen_pages(cache, at.block_page, block_indices)
    out_slc, _ = ops.selected_attention(
        q,
        *pages,
        block_indices,
        block_table,
        at.position,
        slc_block_len=cfg.slc_block_len,
        softmax_scale=scale,
        **short,
    )
    out_win, _ = ops.window_attention(q, *window, at.win_begin, at.win_end, softmax_scale=scale, **tiles.options)
    out = ops.combine(gates, out_cmp, out_slc, out_win)
    return out, in_sequence(block_indices, at, cfg.slc_block_len)


def _compressed(cache: NSACache, at: Places) -> Pair:
    """All compressed keys and values of the sequences, [M, Hkv, D]."""
    found = cache.storage.read_pages(cache.storage.cmp, at.cmp_slots)
    if at.cmp_to is None:
        return found
    return Pair(*(x.new_zeros(at.num_cmp_rows, *x.shape[1:]).index_copy_(0, at.cmp_to, x) for x in found))


def _padded(x: Tensor, at: Places) -> Tensor:
    if at.token_rows is None:
        return x
    return x.new_zeros(at.num_rows, *x.shape[1:]).index_copy_(0, at.token_rows, x)


def _tiles(ops: ModuleType, q: Tensor, cache: NSACache, num_sequences: int, is_prefill: bool) -> Tiles:
    tiles = Tiles.of(ops, q.shape[1] // cache.shape.num_kv_heads, cache.cfg, num_sequences)
    if is_prefill or num_sequences == 1 or not tiles.options:
        return tiles
    return Tiles(1, {"aligned": False})  # a tile of decoding queries holds several sequences


def _no_blocks(q: Tensor, cache: NSACache) -> Tensor:
    sizes = (0, cache.shape.num_kv_heads, cache.cfg.num_slc_blocks)
    return torch.empty(sizes, dtype=torch.int32, device=q.device)


def _ranks(
    cache: NSACache, plan: ShardPlan | None, cp_group: dist.ProcessGroup | Comm | None, *, needs_plan: bool
) -> Comm:
    comm = cp_group if isinstance(cp_group, Comm) else Comm(cp_group)
    if plan is None and needs_plan and comm.size > 1:
        raise ValueError(
            f"cp_group of {comm.size} ranks was given without a plan: which tokens of the chunk this rank holds is "
            f"unknown; pass the ShardPlan with which q, kv and gates were sharded"
        )
    if plan is not None and plan.cp_size != comm.size:
        raise ValueError(
            f"the plan is for cp_size={plan.cp_size}, but cp_group has {comm.size} ranks: the cache lies over those; "
            f"build the plan with cp_size={comm.size}, or pass the group of {plan.cp_size}"
        )
    if comm.size == 1:
        over_ranks.refuse_part(cache)
    return comm


def _check_cache(q: Tensor, kv: BranchKV, cache: NSACache) -> None:
    shape, storage = cache.shape, cache.storage
    given = kv.k_cmp.shape[1], q.shape[-1], kv.v_cmp.shape[-1]
    held = shape.num_kv_heads, shape.head_dim_k, shape.head_dim_v
    if given != held:
        raise ValueError(
            f"kv has Hkv, Dk, Dv = {given}, but the cache was made for {held}: it holds one layer's keys and values as "
            f"they are; pass that layer's, or make an NSACache of these sizes"
        )
    if q.dtype != storage.dtype or q.device.type != storage.device.type:
        raise ValueError(
            f"q and kv are {q.dtype} on {q.device}, but the cache {storage.dtype} on {storage.device}: what is kept is "
            f"multiplied as it is; pass .to(cache's), or make the NSACache with dtype={q.dtype}, device='{q.device}'"
        )


def _check_batch(q: Tensor, kv: BranchKV, gates: Tensor, seqs: Sequence[int]) -> None:
    if any(x.dim() != 4 or x.shape[:2] != q.shape[:2] for x in (q, *kv, gates)) or len(q) != len(seqs):
        shapes = [tuple(x.shape) for x in (q, *kv, gates)]
        raise ValueError(
            f"q, kv and gates have shapes {shapes}, and there are {len(seqs)} sequences: each must be "
            f"[B, new, heads, ...] with B = {len(seqs)}, as every sequence gets as many new tokens; unsqueeze(1) for "
            f"one new token, or use nsa_prefill for chunks of different lengths"
        )
    if not 1 <= q.shape[1] <= MOST_BACK:
        raise ValueError(
            f"q has {q.shape[1]} new tokens a sequence, but nsa_decode takes 1 to {MOST_BACK}, which can be taken "
            f"back again; append longer chunks with nsa_prefill"
        )


def _check_distinct(seqs: Sequence[int]) -> None:
    if len(set(seqs)) < len(seqs):
        raise ValueError(
            f"seqs={list(seqs)} has a sequence twice, and which of its chunks comes first is unknown; pass each id once"
        )
