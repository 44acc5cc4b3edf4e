"""A decoding step over ranks: held to one that has all, then its time, and what of it is the exchange."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

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
from nsa_dist.inference.pool import CmpPlacement
from nsa_dist.inference.storage import indexable
from nsa_dist.operators import default_ops


@dataclass(frozen=True)
class DecodeOverRanks:
    """A task of a bench's team: one case over all of its ranks. The row of this rank; `wrong` where results differ."""

    case: DecodeCase
    placement: CmpPlacement | None = None  # None: the cache's own choice
    runs: int = 20

    def __call__(self, world: World) -> Row:
        comm = world.comm(world.place.num_ranks)
        whole = Layer.of(self.case, world.device)
        mine = OwnPart.of(whole, comm, self.placement)
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
    def of(cls, whole: Layer, comm: Comm, placement: CmpPlacement | None) -> "OwnPart":
        """The same sequences in pages that lie over the ranks."""
        case, shape, device = whole.case, whole.cache.shape, whole.q.device
        each = case.batch * -(-case.pages // comm.size)
        cache = NSACache(
            case.cfg, *case.heads[1:], each, dtype=whole.q.dtype, device=device, compress_k=whole.cache.compress_k,
            compress_v=whole.cache.compress_v, max_sequences=case.batch,
            max_tokens=case.pages * case.cfg.slc_block_len, page_dtype=case.page_dtype, cmp_placement=placement,
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

    @property
    def placement(self) -> CmpPlacement:
        assert isinstance(self.cache.storage, RankStorage)
        return self.cache.storage.placement

    def step_bytes(self, q: Tensor) -> dict[str, int]:
        """That a step of q [B, new, Hq, Dk] sends, by kind."""
        batch, new, num_q_heads = q.shape[:3]
        return decode_bytes(
            self.cache.shape, num_q_heads=num_q_heads, num_sequences=batch, new=new, cp_size=self.comm.size,
            dtype=q.dtype, placement=self.placement, on_gpu=q.is_cuda,
        )  # fmt: skip

    def slots(self) -> Tensor:
        """Of the sequences; the tables on the device say what the cache holds."""
        self.cache.tables.tell([self.cache.state(seq) for seq in self.seqs], self.cache.storage.num_rings)
        return slots_of(self.cache, self.seqs)


def _copy(
    cache: NSACache, from_pages: Tensor, from_ring: int, storage: RankStorage, pages: Tensor, ring: int
) -> None:  # fmt: skip
    whole = cache.storage
    for own, of_one, to in (
        (storage.slc, whole.slc, storage.slc_pages(pages)),
        (storage.cmp, whole.cmp, storage.cmp_pages(pages)),
    ):
        for x, y in zip(own, of_one, strict=True):
            indexable(x)[to[to >= 0].to(x.device)] = indexable(y)[from_pages[to >= 0].to(y.device)]
    for ahead, keys in enumerate(storage.following, 1):
        to = storage.slc_pages(pages, ahead)
        source = whole.cmp.k[from_pages[to >= 0].to(keys.device), : keys.shape[1]]
        keys[to[to >= 0].to(keys.device)] = source
    for x, y in zip((*storage.win, *storage.raw), (*whole.win, *whole.raw), strict=True):
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
    by_formula = mine.step_bytes(whole.q)
    if sent != by_formula:
        wrong, note = True, f"a step sent {sent}, by the formula {by_formula}"
    return {
        "cmp_placement": mine.placement, "exchanges": len(sent), "sent_bytes": sent, "error": error,
        "other_blocks": other, "rows": rows, "wrong": note if wrong else None,
    }  # fmt: skip


def _graphs(mine: OwnPart, q: Tensor, kv: BranchKV, gates: Tensor, clock: Clock) -> Row:
    """A step; the same with nothing sent; its all-gathers alone."""
    slots, lengths, ops = mine.slots(), mine.cache.tables.lengths, default_ops(q)

    def step(comm: Comm) -> Callable[[], object]:
        return lambda: over_ranks.decode_step(q, kv, gates, mine.cache, slots, comm, ops)

    messages = {
        kind: torch.zeros(count // (mine.comm.size - 1), dtype=torch.uint8, device=q.device)
        for kind, count in mine.step_bytes(q).items()
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
