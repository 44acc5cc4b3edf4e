"""What the ranks of a team do together: compare with one rank, time a case, time the links. Each a picklable call."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nsa_dist.bench.case import Case
from nsa_dist.bench.layer import layer_forward
from nsa_dist.bench.measure import elapsed, mark, measure, new_trace
from nsa_dist.bench.selection import Replay, with_selection
from nsa_dist.bench.shard import Shard, drawn, make_shard
from nsa_dist.bench.solo import measure_share
from nsa_dist.bench.world import World
from nsa_dist.cp.comm import Comm, Traffic
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.operators import default_ops

Row = dict[str, Any]


@dataclass(frozen=True)
class Compare:
    """The case against one rank: output, chosen blocks and every gradient, on inputs that are the same everywhere.

    The blocks are those that the keys ask for. The gradients of phi's parameters are each rank's part, summed here.
    """

    case: Case

    def __call__(self, world: World) -> Row | None:
        case = self.case
        if world.rank >= case.cp_size:
            return None
        whole, plan, comm = make_shard(case, case.tokens, world.device, seed=0), case.plan(), world.comm(case.cp_size)
        one = replace(case, cp_size=1, mode="fetch", page_budget_bytes=None)
        expected = _attend(whole, one, Comm())
        mine = _part(whole, plan, world.rank)
        got, again = (_attend(mine, case, comm) for _ in range(2))
        for name in [n for n in expected if n.startswith("phi")]:
            got[name] = comm.all_gather(got[name], "check").sum(0)
        wanted = {n: x if n.startswith("phi") else plan.shard(x, world.rank) for n, x in expected.items()}
        return {
            "same": [name for name, x in wanted.items() if torch.equal(got[name], x)],
            "repeats": all(torch.equal(got[name], again[name]) for name in again if not name.startswith("phi")),
            "errors": {name: _error(got[name], x) for name, x in wanted.items()},
        }


@dataclass(frozen=True)
class Measure:
    """The case timed on every rank of its group, the selection set to its u."""

    case: Case
    repeats: int
    keep_spans: bool = False

    def __call__(self, world: World) -> Row | None:
        case, rank, device = self.case, world.rank, world.device
        if rank >= case.cp_size:
            return None
        plan = case.plan()
        shard = make_shard(case, plan.tokens_per_rank, device, seed=rank)
        draw = drawn(case, rank, device)
        trace = new_trace(device)
        comm = replace(world.comm(case.cp_size), traffic=Traffic(), trace=trace)
        forward = layer_forward(case, shard, comm, with_selection(default_ops(shard.q), Replay(draw.block_indices)))
        measured = measure(forward, shard, comm, repeats=self.repeats, ready=lambda: world.comm(case.cp_size).agree(0))
        row = {"union_fractions": draw.union_fractions, "pages": int(draw.remote.sum()), **asdict(measured)}
        return row | {"spans": trace.spans()} if self.keep_spans else row


@dataclass(frozen=True)
class Alone:
    """The same share on every rank with nothing sent: what a rank would take if the links were infinitely fast."""

    case: Case
    repeats: int

    def __call__(self, world: World) -> Row | None:
        if world.rank >= self.case.cp_size:
            return None
        return measure_share(self.case, world.device, world.rank, self.repeats)


@dataclass(frozen=True)
class Links:
    """The collectives by themselves: seconds of one that sends `sent_bytes` from every rank to the others in all."""

    cp_size: int
    sent_bytes: tuple[int, ...]

    def __call__(self, world: World) -> list[Row] | None:
        if world.rank >= self.cp_size:
            return None
        comm, rows = world.comm(self.cp_size), []
        for num_bytes in self.sent_bytes:
            for name, call in _collectives(comm, num_bytes, world.device).items():
                times = []
                for _ in range(6):
                    comm.agree(0)
                    begin = mark(world.device)
                    call()
                    times.append(elapsed([begin, mark(world.device)])[0])
                rows.append({"collective": name, "sent_bytes": num_bytes, "seconds": median(times[1:])})
        return rows


def _attend(shard: Shard, case: Case, comm: Comm) -> dict[str, Tensor]:
    """out, block_indices, and the gradients of everything that has one, by name."""
    chosen: list[Tensor] = []

    def keep(block_indices: Tensor) -> Tensor:
        chosen.append(block_indices)
        return block_indices

    out = layer_forward(case, shard, comm, with_selection(default_ops(shard.q), keep))()
    grads = torch.autograd.grad(out, shard.leaves, shard.grad_out)
    phis = [
        f"phi_{which}.{name}" for which, phi in zip("kv", shard.phi, strict=True) for name, _ in phi.named_parameters()
    ]
    names = ["dq", *(f"d{name}" for name in shard.kv_leaves), "dgates", *phis]
    return {"out": out.detach(), "block_indices": torch.cat(chosen, 1)} | dict(zip(names, grads, strict=True))


def _part(whole: Shard, plan: ShardPlan, rank: int) -> Shard:
    """What `rank` holds of the whole sequence's inputs."""

    def cut(x: Tensor) -> Tensor:
        return plan.shard(x.detach(), rank).requires_grad_(x.requires_grad)

    parts = {id(x): cut(x) for x in whole.kv_leaves.values()}
    kv = type(whole.kv)(*(parts[id(x)] for x in whole.kv))
    return replace(whole, q=cut(whole.q), kv=kv, gates=cut(whole.gates), grad_out=cut(whole.grad_out))


def _error(actual: Tensor, expected: Tensor) -> float:
    """Of the norm, relative; for ids the share that differs."""
    if not expected.is_floating_point():
        return (actual != expected).float().mean().item()
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _collectives(comm: Comm, num_bytes: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Each sends `num_bytes` from every rank, evenly to all others."""
    size, each = comm.size, max(1, num_bytes // (comm.size - 1))
    one = torch.zeros(each, dtype=torch.uint8, device=device)
    all_of_them = torch.zeros(size, -(-each // 4), dtype=torch.float32, device=device)
    rows = one.repeat(size)
    sizes = [each] * size
    return {
        "all_gather": lambda: comm.all_gather(one, "bench"),
        "all_to_all": lambda: comm.all_to_all(rows, sizes, sizes, "bench"),
        "reduce_scatter": lambda: comm.reduce_scatter(all_of_them, "bench"),
    }
