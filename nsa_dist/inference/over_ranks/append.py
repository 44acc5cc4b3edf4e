"""New tokens, the same on every rank, attend to what all ranks hold. The order of things: the head of this folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from nsa_dist.branches import BranchKV
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.pages import only_here
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.over_ranks.choose import candidates, choose
from nsa_dist.inference.over_ranks.partials import checksum, gather_lse, gather_outs
from nsa_dist.inference.over_ranks.share import Share
from nsa_dist.inference.over_ranks.storage import RankStorage, spread
from nsa_dist.inference.places import Places, places, put
from nsa_dist.inference.rows import chosen_pages, compressed, extended, write_rings
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
        out_cmp, lse = call.compressed()
        told = torch.tensor([*seqs, *(state.length for state in states)], device=q.device)
        lse_cmp = gather_lse(lse, torch.cat([told, checksum([q, *kv, gates])]), comm).logsumexp(0)
        block_indices = choose(*call.candidates(lse_cmp), comm)
        partials = [(out_cmp, lse), call.selected(block_indices)]
        out_win = call.window(Pair(kv.k_win, kv.v_win))
        out_cmp, out_slc = gather_outs(partials, [lse_cmp, None], comm)
        out = ops.combine(gates, out_cmp, out_slc, out_win)
        write_rings(kv, cache, at)
    return out, block_indices.to(torch.int32)


def _write_pages(
    kv: BranchKV, cache: NSACache, storage: RankStorage, at: Places, share: Share, ops: ModuleType
) -> None:
    """What of the new tokens and of the compressed blocks that they make whole belongs here."""
    tokens = share.tokens
    storage.slc.write(tokens.slots, Pair(*(x.index_select(0, tokens.rows) for x in (kv.k_slc, kv.v_slc))))
    if not len(at.fresh_slots):
        return
    fresh = compressed(Pair(kv.k_cmp, kv.v_cmp), cache, at, ops)
    storage.cmp.write(share.fresh.slots, Pair(*(x.index_select(0, share.fresh.rows) for x in fresh)))
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

    def compressed(self) -> Partial:
        """Attention to the compressed blocks here."""
        rows, seen = self.storage.cmp.read(self.share.cmp_slots), (self.share.cmp_begin, self.share.cmp_end)
        return self.ops.compressed_attention(self.q, *rows, *seen, softmax_scale=self.softmax_scale, **self._tiles)

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
