"""New tokens, the same on every rank, attend to what all ranks hold. The order of things: the head of this folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from nsa_dist.branches import BranchKV
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.pages import only_here
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.over_ranks.choose import candidates, choose
from nsa_dist.inference.over_ranks.partials import checksum, gather_checked, gather_outs
from nsa_dist.inference.over_ranks.share import Share
from nsa_dist.inference.over_ranks.storage import RankStorage, spread
from nsa_dist.inference.places import Places, places, put
from nsa_dist.inference.rows import chosen_blocks, chosen_pages, compressed, extended, in_sequence, write_rings
from nsa_dist.inference.storage import Pair

Partial = tuple[Tensor, Tensor]  # out [T, Hq, Dv], softmax_lse [T, Hq] over the keys of this rank


@torch.no_grad()
def append(
    q: Tensor, kv: BranchKV, gates: Tensor, cache: NSACache, seqs: Sequence[int], added: Sequence[int],
    ops: ModuleType, softmax_scale: float, comm: Comm,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [T, Hq, Dv] and block_indices int32 [T, Hkv, n] of packed new tokens, T > 0, the same on every rank."""
    storage = spread(cache, comm)
    with cache.appending(seqs, added) as states, torch.autocast(q.device.type, enabled=False):
        on_host = places(states, added, cache.shape, torch.device("cpu"), aligned=False, key_alignment=1)
        share = Share.of(on_host, states, added, storage, q.device)
        at = on_host if q.device.type == "cpu" else put(on_host, q.device)
        _write_pages(kv, cache, storage, at, share, ops)
        call = _Call(q, cache, storage, at, share, ops, softmax_scale)
        told = torch.tensor([*seqs, *(state.length for state in states)], device=q.device)
        told = torch.cat([told, checksum([q, *kv, gates])])
        out_cmp, out_slc, block_indices = (_replicated if storage.is_replicated else _sharded)(call, told, comm)
        out_win = call.window(Pair(kv.k_win, kv.v_win))
        out = ops.combine(gates, out_cmp, out_slc, out_win)
        write_rings(kv, cache, at)
    return out, block_indices.to(torch.int32)


def _replicated(call: "_Call", told: Tensor, comm: Comm) -> tuple[Tensor, Tensor, Tensor]:
    """out_cmp, out_slc and block_indices, ids in each sequence: this rank chooses alone."""
    out_cmp, lse = call.compressed()
    block_indices = call.chosen(lse)
    (out_slc,) = gather_outs([call.selected(block_indices)], [None], comm, told)
    return out_cmp, out_slc, block_indices


def _sharded(call: "_Call", told: Tensor, comm: Comm) -> tuple[Tensor, Tensor, Tensor]:
    """The same: the ranks choose together."""
    out_cmp, lse = call.compressed()
    lse_cmp = gather_checked(lse, told, "lse", comm).logsumexp(0)
    block_indices = choose(*call.candidates(lse_cmp), comm)
    out_cmp, out_slc = gather_outs([(out_cmp, lse), call.selected(block_indices)], [lse_cmp, None], comm)
    return out_cmp, out_slc, block_indices


def _write_pages(
    kv: BranchKV, cache: NSACache, storage: RankStorage, at: Places, share: Share, ops: ModuleType
) -> None:
    """What of the new tokens and of the compressed blocks that they make whole belongs here."""
    tokens = share.tokens
    storage.write_pages(
        storage.slc, tokens.slots, Pair(*(x.index_select(0, tokens.rows) for x in (kv.k_slc, kv.v_slc)))
    )
    if not len(at.fresh_slots):
        return
    fresh = compressed(Pair(kv.k_cmp, kv.v_cmp), cache, at, ops)
    here = Pair(*(x.index_select(0, share.fresh.rows) for x in fresh))
    storage.write_pages(storage.cmp, share.fresh.slots, here)
    for keys, kept in zip(storage.following, share.following, strict=True):
        keys.flatten(0, 1).index_copy_(0, kept.slots, fresh.k.index_select(0, kept.rows))


@dataclass(frozen=True)
class _Call:
    """The new queries [T, Hq, Dk] and what they attend to on this rank."""

    q: Tensor
    cache: NSACache
    storage: RankStorage
    at: Places
    share: Share
    ops: ModuleType
    softmax_scale: float

    @cached_property
    def cmp_rows(self) -> Pair:
        """The compressed rows here, of all the sequences."""
        return self.storage.read_pages(self.storage.cmp, self.share.cmp_slots)

    def compressed(self) -> Partial:
        """Attention to the compressed blocks here."""
        seen, scale = (self.share.cmp_begin, self.share.cmp_end), self.softmax_scale
        return self.ops.compressed_attention(self.q, *self.cmp_rows, *seen, softmax_scale=scale, **self._tiles)

    def chosen(self, lse: Tensor) -> Tensor:
        """The n blocks of every query, ids in the sequence, where all compressed rows are here."""
        found = chosen_blocks(self.q, self.cmp_rows.k, lse, self.cache, self.at, self.ops, self.softmax_scale)
        return in_sequence(found, self.at, self.cache.cfg.slc_block_len)

    def candidates(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Of every query the best selection blocks here, (importance, id in the sequence) [T, Hkv, n]; lse merged."""
        num_cmp = self.at.cmp_end - self.at.cmp_begin
        block = torch.div(self.at.position - self.at.doc_start, self.cache.cfg.slc_block_len, rounding_mode="floor")
        found = [
            candidates(
                self.q[own.queries], own.keys(self.storage), lse[own.queries], own.blocks, num_cmp[own.queries],
                block[own.queries].long(), self.softmax_scale, self.cache.cfg,
            )
            for own in self.share.sequences
        ]  # fmt: skip
        values, ids = (torch.cat(x) for x in zip(*found, strict=True))
        return values, ids

    def selected(self, block_indices: Tensor) -> Partial:
        """Attention to those of the chosen blocks, ids in the sequence, that are here."""
        block_len = self.cache.cfg.slc_block_len
        first = torch.div(self.at.doc_start, block_len, rounding_mode="floor")[:, None, None]
        of_stream = torch.where(block_indices >= 0, block_indices + first, -1)
        heads = self.cache.shape.num_kv_heads
        here = only_here(of_stream, self.share.block_page.expand(heads, -1)).to(torch.int32)
        pages, block_table = chosen_pages(self.cache, self.share.block_page, here)
        return self.ops.selected_attention(
            self.q, *pages, here, block_table, self.at.position,
            slc_block_len=block_len, softmax_scale=self.softmax_scale,
        )  # fmt: skip

    def window(self, new: Pair) -> Tensor:
        """Attention to the window, which every rank holds: nothing is sent."""
        rows, seen = extended(new, self.storage.win, self.at.win), (self.at.win_begin, self.at.win_end)
        scale = self.softmax_scale
        return self.ops.window_attention(self.q, *rows, *seen, softmax_scale=scale, **self._tiles)[0]

    @property
    def _tiles(self) -> dict[str, bool]:
        """Of kernels with tiles: these queries are not where tiles of training begin."""
        return {"aligned": False} if hasattr(self.ops, "WHOLE_TILES") else {}
