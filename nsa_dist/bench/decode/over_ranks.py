"""A decoding step over ranks: held to one that has all, then its time, and what of it is the exchange."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nsa_dist.attention import default_ops
from nsa_dist.bench.decode.case import DecodeCase
from nsa_dist.bench.decode.layer import Layer
from nsa_dist.bench.decode.measure import MOST_ERROR, Clock, Row, captured
from nsa_dist.bench.world import World
from nsa_dist.branches import BranchKV
from nsa_dist.cp.comm import Comm
from nsa_dist.inference import over_ranks
from nsa_dist.inference.attend import nsa_decode
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.decode import slots_of
from nsa_dist.inference.over_ranks.storage import RankStorage, spread
from nsa_dist.inference.over_ranks.traffic import decode_bytes


@dataclass(frozen=True)
class DecodeOverRanks:
    """A task of a bench's team: one case over all of its ranks. The row of this rank; `wrong` where results differ."""

    case: DecodeCase
    runs: int = 20

    def __call__(self, world: World) -> Row:
        comm = world.comm(world.place.num_ranks)
        whole = Layer.of(self.case, world.device)
        mine = OwnPart.of(whole, comm)
        row = _check(whole, mine)
        on_graphs = world.device.type == "cuda" and whole.has_kernels
        clock = Clock(self.runs) if on_graphs else None
        if clock and not row["wrong"]:
            row["one_rank_s"] = _one_rank_seconds(whole, clock)
        q, kv, gates = whole.q, whole.kv, whole.gates
        del whole
        gc.collect()
        if row["wrong"]:
            return row
        call_s = _host_seconds(lambda: nsa_decode(q, kv, gates, mine.cache, mine.seqs, cp_group=comm), 5, world)
        return row | {"call_s": call_s} | (_graphs(mine, q, kv, gates, clock) if clock and comm.is_on_device else {})


@dataclass
class OwnPart:
    """One rank's part of a layer's cache."""

    cache: NSACache
    seqs: list[int]
    comm: Comm

    @classmethod
    def of(cls, whole: Layer, comm: Comm) -> "OwnPart":
        """The same sequences in pages that lie over the ranks."""
        case, shape, device = whole.case, whole.cache.shape, whole.q.device
        each = case.batch * -(-case.pages // comm.size)
        cache = NSACache(
            case.cfg, *case.heads[1:], each, dtype=whole.q.dtype, device=device, compress_k=whole.cache.compress_k,
            compress_v=whole.cache.compress_v, max_sequences=case.batch,
            max_tokens=case.pages * case.cfg.slc_block_len,
        )  # fmt: skip
        storage = spread(cache, comm)
        seqs = [cache.new_sequence() for _ in range(case.batch)]
        with cache.appending(seqs, [case.pages * shape.cfg.slc_block_len] * case.batch) as states:
            pass
        for state, seq in zip(states, whole.seqs, strict=True):
            theirs = whole.cache.state(seq)
            _copy(whole.cache, theirs.pages, theirs.ring, storage, state.pages, state.ring)
            state.length = state.longest = theirs.length
        return cls(cache, seqs, comm)

    def slots(self) -> Tensor:
        """Of the sequences; the tables on the device say what the cache holds."""
        self.cache.tables.tell([self.cache.state(seq) for seq in self.seqs], self.cache.storage.num_rings)
        return slots_of(self.cache, self.seqs)


def _copy(
    cache: NSACache, from_pages: Tensor, from_ring: int, storage: RankStorage, pages: Tensor, ring: int
) -> None:  # fmt: skip
    here = storage.is_of(pages)
    for x, y in zip((*storage.slc, *storage.cmp), (*cache.storage.slc, *cache.storage.cmp), strict=True):
        x[(pages[here] // storage.cp_size).to(x.device)] = y[from_pages[here].to(y.device)]
    for ahead, keys in enumerate(storage.following, 1):
        there = storage.is_of(pages, ahead)
        source = cache.storage.cmp.k[from_pages[there].to(keys.device), : keys.shape[1]]
        keys[(pages[there] // storage.cp_size).to(keys.device)] = source
    for x, y in zip((*storage.win, *storage.raw), (*cache.storage.win, *cache.storage.raw), strict=True):
        x[ring] = y[from_ring]


def _check(whole: Layer, mine: OwnPart) -> Row:
    """One call of each: the error against the reference, blocks against those of one rank, and bytes that were sent."""
    _, one_blocks = whole.call()
    before = dict(mine.comm.traffic.sent_bytes)
    found = nsa_decode(
        whole.q, whole.kv, whole.gates, mine.cache, mine.seqs, cp_group=mine.comm, return_block_indices=True
    )
    assert isinstance(found, tuple)
    out, blocks = found
    sent = {kind: count - before.get(kind, 0) for kind, count in mine.comm.traffic.sent_bytes.items()}
    sent.pop("layout", None)  # the first call compares how caches were made
    case = whole.case
    some = sorted({0, case.batch // 2, case.batch - 1})
    expected, _ = whole.expected(whole.tables(), some)
    error = ((out[some].double() - expected.double()).norm() / expected.double().norm()).item()
    other, rows = int((blocks != one_blocks).any(-1).sum()), one_blocks[..., 0].numel()
    wrong = not error <= MOST_ERROR or other > max(1, rows // 50)
    note = f"out differs by {error:.1e} of its norm from the reference, {other} of {rows} rows chose other blocks"
    sizes: dict[str, Any] = {"num_q_heads": case.heads[0], "num_sequences": case.batch, "new": 1}
    by_formula = decode_bytes(
        mine.cache.shape, **sizes, cp_size=mine.comm.size, dtype=case.torch_dtype, on_gpu=out.is_cuda
    )
    if sent != by_formula:
        wrong, note = True, f"a step sent {sent}, by the formula {by_formula}"
    return {"error": error, "other_blocks": other, "rows": rows, "sent_bytes": sent, "wrong": note if wrong else None}


def _graphs(mine: OwnPart, q: Tensor, kv: BranchKV, gates: Tensor, clock: Clock) -> Row:
    """A step; the same with nothing sent; its three all-gathers alone."""
    slots, lengths, ops = mine.slots(), mine.cache.tables.lengths, default_ops(q)

    def step(comm: Comm) -> Callable[[], object]:
        return lambda: over_ranks.decode_step(q, kv, gates, mine.cache, slots, comm, ops)

    rows, dim_v = q.shape[:3].numel(), kv.v_cmp.shape[-1]
    chosen = 1 << max(1, mine.cache.cfg.num_slc_blocks - 1).bit_length()
    messages = {
        "lse": q.new_zeros(rows, dtype=torch.float32),
        "candidates": q.new_zeros(q.shape[0] * kv.k_cmp.shape[2] * chosen, dtype=torch.int64),
        "partials": q.new_zeros(2 * rows * (dim_v + 1), dtype=torch.float32),
    }

    def exchange() -> None:
        for kind, x in messages.items():
            mine.comm.all_gather(x, kind)

    return {
        "graph_s": _replayed(step(mine.comm), lengths, clock),
        "nothing_sent_s": _replayed(step(Silent(mine.comm.group)), lengths, clock),
        "exchange_s": _replayed(exchange, lengths, clock),
    }


@dataclass(frozen=True)
class Silent(Comm):
    """Ranks that hear from nobody but themselves: what a step takes without the exchange."""

    def _start_all_gather(self, out: Tensor, x: Tensor, kind: str) -> None:
        out.copy_(x.expand_as(out))


def _replayed(step: Callable[[], object], lengths: Tensor, clock: Clock) -> float:
    """Of a graph; lengths are put back before each run."""
    at = lengths.clone()
    graph = captured(step)
    seconds = clock.seconds(graph.replay, before=lambda: lengths.copy_(at))
    lengths.copy_(at)
    return seconds


def _one_rank_seconds(whole: Layer, clock: Clock) -> float:
    slots = whole.tables()
    return _replayed(lambda: whole.step(slots), whole.cache.tables.lengths, clock)


def _host_seconds(call: Callable[[], object], runs: int, world: World) -> float:
    times = []
    for _ in range(runs):
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times)
