"""A chunk that is sharded by a plan: first chunks through training's forward, later ones gathered on every rank.

What a rank wants of the first chunks is a list of places in the plan's stream; who has them, and in which row, the plan
says. Every rank works out the lists of all, so nothing but the rows is sent, in an all-to-all each:

    slc     the tokens of its own pages, k_slc and v_slc
    cmp     k_cmp and v_cmp of every page: its tokens and l - d on both sides, all of every block that shares cells with
            it. Where compressed rows are replicated, an all-gather then takes what phi made to every rank
    rings   the last w + 8 tokens of k_win and v_win, the last l + 8 of k_cmp and v_cmp: these on every rank
"""

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from nsa_dist.attention import nsa_attention
from nsa_dist.branches import BranchKV
from nsa_dist.compress import BlockPlaces, compress_both
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.device import put_on
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.over_ranks.held import as_held
from nsa_dist.inference.over_ranks.storage import RankStorage, spread
from nsa_dist.inference.over_ranks.wanted import Chunks, Moves, Rows
from nsa_dist.inference.storage import Pair


def gathered(shards: Sequence[Tensor], plan: ShardPlan, comm: Comm) -> list[Tensor]:
    """The packed tokens [N, ...] of each shard [T, ...], on every rank."""
    return [plan.unshard(list(comm.all_gather(x, "tokens"))) for x in shards]


def own_rows(results: tuple[Tensor, Tensor], plan: ShardPlan, comm: Comm) -> tuple[Tensor, Tensor]:
    """This rank's rows of out and block_indices of the packed tokens; padding is 0 and -1."""
    out, block_indices = results
    return plan.shard(out, comm.rank), plan.shard(block_indices + 1, comm.rank) - 1


@torch.no_grad()
def first_chunks(
    q: Tensor, kv: BranchKV, gates: Tensor, cache: NSACache, seqs: Sequence[int], plan: ShardPlan, comm: Comm,
    ops: ModuleType, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [T, Hq, Dv] and block_indices int32 [T, Hkv, n], ids in each sequence, of this rank's shard of sequences
    that are empty so far."""
    storage = spread(cache, comm)
    added = [stop - start for start, stop in pairwise(plan.cu_seqlens)]
    with cache.appending(seqs, added) as states, torch.autocast(q.device.type, enabled=False):
        held, compress_k, compress_v = as_held(kv, cache)
        results = nsa_attention(
            q, held, gates, cache.cfg, compress_k=compress_k, compress_v=compress_v, plan=plan, cp_group=comm,
            ops=ops, softmax_scale=softmax_scale, return_block_indices=True,
        )  # fmt: skip
        _move(kv, cache, storage, Chunks(states, plan, cache.shape), comm, ops)
    out, block_indices = results
    # nsa_attention names blocks by the stream of one rank.
    starts = torch.tensor(ShardPlan.contiguous(plan.cu_seqlens, 1, plan.block_len).stream_starts)
    first = starts[plan.local_blocks(comm.rank).document].repeat_interleave(plan.block_len) // plan.block_len
    first = put_on(q.device, first.to(torch.int32))[:, None, None]
    return out, torch.where(block_indices >= 0, block_indices - first, -1)


def _move(kv: BranchKV, cache: NSACache, storage: RankStorage, chunks: Chunks, comm: Comm, ops: ModuleType) -> None:
    """The rows of this rank's shard to where the cache has them."""
    cfg, shape, device = cache.cfg, cache.shape, kv.k_slc.device

    def of_pages(rank: int, more: int) -> Rows:
        tokens = chunks.of_pages(chunks.pages(rank), more)
        return tokens.where(chunks.exist(tokens))

    around = cfg.cmp_block_len - cfg.cmp_stride
    pairs = [
        Moves.of(chunks, wanted, comm.rank, device).run(pair, comm)
        for wanted, pair in (
            (lambda rank: of_pages(rank, 0), Pair(kv.k_slc, kv.v_slc)),
            (lambda rank: of_pages(rank, around), Pair(kv.k_cmp, kv.v_cmp)),
            (lambda rank: chunks.last(shape.win_ring), Pair(kv.k_win, kv.v_win)),
            (lambda rank: chunks.last(shape.raw_ring), Pair(kv.k_cmp, kv.v_cmp)),
        )
    ]
    own = of_pages(comm.rank, 0)
    page = chunks.page_id(Rows(own.sequence, own.place // cfg.slc_block_len)) // comm.size
    rows = put_on(device, page * cfg.slc_block_len + own.place % cfg.slc_block_len)
    storage.write_pages(storage.slc, rows, pairs[0])
    _compress(pairs[1], cache, storage, chunks, comm, ops)
    for pair, ring, count in zip(pairs[2:], (storage.win, storage.raw), (shape.win_ring, shape.raw_ring), strict=True):
        last = chunks.last(count)
        ring.write(put_on(device, chunks.ring[last.sequence] * count + last.place % count), pair)


def _compress(
    came: Pair, cache: NSACache, storage: RankStorage, chunks: Chunks, comm: Comm, ops: ModuleType
) -> None:  # fmt: skip
    """phi of the blocks that lie in the pages of this rank, and of those that only share cells with them."""
    cfg, device, per_page = cache.cfg, came.k.device, cache.shape.cmp_per_page
    pages = chunks.pages(storage.cp_rank)
    around = chunks.of_pages(pages, cfg.cmp_block_len - cfg.cmp_stride)
    rows = put_on(device, chunks.exist(around).nonzero().squeeze(1))
    raw = [x.new_zeros(len(around.place), *x.shape[1:]).index_copy_(0, rows, x) for x in came]
    kept = [per_page, *(keys.shape[1] for keys in storage.following)]  # of a page, and of those after it
    blocks = chunks.blocks_of(pages, sum(kept))
    whole = chunks.are_whole(blocks).nonzero().squeeze(1)
    made = _phi(Pair(*raw), cache, chunks, (pages, around, blocks), whole, ops)
    cell = whole % sum(kept)
    if storage.is_replicated:
        _to_all(made, cell + whole // sum(kept) * per_page, storage, chunks, comm)
        return
    page, ahead = pages.place[whole // sum(kept)], cell // per_page  # 0: it lies in the page, 1: in the one after, ...
    of = chunks.page_id(Rows(blocks.sequence[whole], page + ahead)) // storage.cp_size
    for step, cells in enumerate(kept):
        use = (ahead == step).nonzero().squeeze(1)
        slots, index = put_on(device, (of * cells + cell % per_page)[use]), put_on(device, use)
        if step == 0:
            storage.write_pages(storage.cmp, slots, Pair(*(x.index_select(0, index) for x in made)))
        else:
            storage.following[step - 1].flatten(0, 1).index_copy_(0, slots, made[0].index_select(0, index))


def _phi(
    raw: Pair, cache: NSACache, chunks: Chunks, around: tuple[Rows, Rows, Rows], whole: Tensor, ops: ModuleType
) -> Pair:
    """[F, Hkv, D] of the blocks `whole` [F], places in `blocks`; around: pages, their tokens with those on both sides,
    which are the rows of `raw`, and their blocks."""
    pages, tokens, blocks = around
    if not len(whole):
        return Pair(*(x[:0] for x in raw))
    cfg, device = cache.cfg, raw.k.device
    count = len(blocks.place) // len(pages.place)  # of each page, every d rows one
    row = whole // count * (len(tokens.place) // len(pages.place)) + whole % count * cfg.cmp_stride
    start = blocks.place[whole] * cfg.cmp_stride
    places = BlockPlaces(put_on(device, row.to(torch.int32)), put_on(device, start), cfg.cmp_block_len)
    return Pair(*compress_both((cache.compress_k, cache.compress_v), (raw.k, raw.v), places, ops))


def _to_all(made: Pair, cells: Tensor, storage: RankStorage, chunks: Chunks, comm: Comm) -> None:
    """What each rank's phi made of its pages, at `cells` of them, into the pages of every rank; an all-gather."""
    device, per_page = made.k.device, storage.shape.cmp_per_page
    ids = [chunks.page_id(chunks.pages(rank)) for rank in range(comm.size)]
    sent = torch.cat(made, -1)
    sent = sent.new_zeros(max(map(len, ids)) * per_page, *sent.shape[1:]).index_copy_(0, put_on(device, cells), sent)
    gathered = comm.all_gather(sent, "compressed")
    slots = put_on(device, (torch.cat(ids)[:, None] * per_page + torch.arange(per_page)).flatten())
    rows = torch.cat([rows[: len(own) * per_page] for own, rows in zip(ids, gathered, strict=True)])
    storage.write_pages(storage.cmp, slots, Pair(*rows.split([x.shape[-1] for x in made], -1)))
