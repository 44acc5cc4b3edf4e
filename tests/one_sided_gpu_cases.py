"""Ranks with a GPU each that read each other's pages: what tests/cp/test_one_sided_gpu.py runs."""

import itertools
import os
import socket
import time
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import nsa_kernels
from cp_gpu_cases import NAMES, attend, make_inputs
from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.cp.comm import Traffic
from nsa_dist.cp.one_sided.choice import transport_of
from nsa_dist.cp.one_sided.mailboxes import naming_the_missing
from nsa_dist.cp.options import FetchOptions
from nsa_launch.ranks.environment import of_nccl

CASES = {
    "one document": ([16384], (16, 4, 128)),
    "packed": ([5000, 31, 2000, 7737], (16, 4, 128)),
    "one kv head, in query halves": ([16384], (16, 1, 128)),
}
LAYOUTS = ("zigzag", "contiguous")
RULES = ("one block", "all blocks", "none remote", "one hot owner")


def on_gpus(world_size: int, work, *args, masked: bool = False) -> list:
    """`work(rank, *args)` in processes with a GPU each, over NCCL; `masked`: each sees its own alone, as under Ray."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_enter, (world_size, port, results, masked, work, args), nprocs=world_size)
        return [results[rank] for rank in range(world_size)]


def _enter(rank: int, world_size: int, port: int, results, masked: bool, work, args) -> None:
    os.environ |= {"NCCL_NVLS_ENABLE": "0"} | of_nccl(world_size)
    device = torch.device("cuda", 0 if masked else rank)
    if masked:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)  # before CUDA looks
    torch.cuda.set_device(device)
    address = f"tcp://localhost:{port}"
    dist.init_process_group(
        "nccl", init_method=address, rank=rank, world_size=world_size, device_id=device, timeout=timedelta(seconds=60)
    )
    results[rank] = work(rank, *args)
    if work is lost:
        os._exit(0)  # its context is gone, and nothing can be taken down any more
    dist.barrier()
    dist.destroy_process_group()


def compare(rank: int) -> dict[tuple, dict]:
    """By (case, layout): what has the bits of one rank, what repeats, what the collectives give."""
    size, found = dist.get_world_size(), {}
    for (name, (lengths, heads)), layout in itertools.product(CASES.items(), LAYOUTS):
        leaves, phis, weight = make_inputs(sum(lengths), *heads)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        out, ids, grads = attend(leaves, phis, weight, bounds)
        plan = getattr(ShardPlan, layout)(bounds, size)
        real = ~plan.padding(rank).cuda()
        one = [plan.shard(x, rank)[real] for x in (out, *grads)]

        def run(plan=plan, real=real, inputs=(leaves, phis, weight, bounds), **options):
            got = attend(*inputs, plan, rank, dist.group.WORLD, FetchOptions(**options))
            return got[1][real], [x[real] for x in (got[0], *got[2])]

        chosen, got = run(transport="one_sided")
        run(transport="one_sided")  # records what is repeated from now on
        again = run(transport="one_sided")[1]
        kept = run(transport="one_sided", keep_pages=True)[1]
        sent = run(transport="all_to_all")[1]
        rounds = run(transport="one_sided", kv_fetch_budget_bytes=2**22)[1]
        wanted = plan.shard(ids.long() + 1, rank)[real] - 1
        found[name, layout] = {
            "ids": torch.equal(chosen.long(), wanted),
            "same": [n for n, a, b in zip(NAMES, got, one, strict=True) if torch.equal(a, b)],
            "repeats": [n for n, a, b in zip(NAMES, got, again, strict=True) if torch.equal(a, b)],
            "kept": [n for n, a, b in zip(NAMES, got, kept, strict=True) if torch.equal(a, b)],
            "as sent": [n for n, a, b in zip(NAMES, got, sent, strict=True) if torch.equal(a, b)],
            "rounds": {n: _error(a, b) for n, a, b in zip(NAMES, rounds, one, strict=True)},
            "errors": {n: _error(a, b) for n, a, b in zip(NAMES, got, one, strict=True)},
        }
    return found


def fuzz(rank: int) -> dict[str, dict]:
    """Selections by rule: both transports against each other, and what they count."""
    size, found = dist.get_world_size(), {}
    leaves, phis, weight = make_inputs(16384, 16, 4, 128)
    plan = ShardPlan.zigzag([0, 16384], size)
    mine = [plan.shard(x, rank).detach().requires_grad_() for x in leaves]
    for rule in RULES:
        results, counted = {}, {}
        for transport in ("one_sided", "all_to_all"):
            traffic = Traffic()
            out = nsa_attention(
                mine[0], BranchKV(*mine[1:7]), mine[7], NSAConfig(), compress_k=phis[0], compress_v=phis[1],
                plan=plan, cp_group=dist.group.WORLD, ops=forced(rule), traffic=traffic,
                fetch=FetchOptions(transport=transport),
            )  # fmt: skip
            grads = torch.autograd.grad(out, mine, plan.shard(weight, rank))
            results[transport] = [out.detach(), *grads]
            told = torch.tensor([traffic.sent_bytes[k] for k in ("pages", "pages.grad", "halo", "compressed")])
            told = told.cuda()
            dist.all_reduce(told)
            counted[transport] = told.tolist(), traffic.union_fractions
        pairs = zip(NAMES, *results.values(), strict=True)
        found[rule] = {"same": [n for n, a, b in pairs if torch.equal(a, b)], "counted": counted}
    return found


def forced(rule: str) -> SimpleNamespace:
    """The kernels, with a selection by rule of blocks that a query may see."""

    def select_blocks(q, k_cmp, lse_cmp, cmp_begin, cmp_end, position, doc_start, *, num_slc_blocks, **sizes):
        own = torch.div(position, sizes["slc_block_len"], rounding_mode="floor")[:, None]
        slot = torch.arange(num_slc_blocks, device=q.device).expand(len(own), -1)
        ids = {
            "one block": slot.where((slot == 0) & (own >= 0), -1),
            "all blocks": _spread(own, num_slc_blocks, slot),
            "none remote": own.where(slot == 0, -1),
            "one hot owner": slot.where((slot <= own) & (slot < 4), -1),
        }[rule]
        return ids[:, None].repeat(1, k_cmp.shape[1], 1).to(torch.int32)

    ops = {name: getattr(nsa_kernels, name) for name in (*nsa_kernels.__all__, "WHOLE_TILES")}
    return SimpleNamespace(**(ops | {"select_blocks": select_blocks}))


def _spread(own: torch.Tensor, num_slots: int, slot: torch.Tensor) -> torch.Tensor:
    """Together the queries choose every block that they may: query t begins at a place of its own."""
    first = torch.arange(len(own), device=own.device)[:, None] * num_slots % (own + 1).clamp(min=1)
    ids = first + slot
    return ids.where(ids <= own, -1)


def captured(rank: int) -> dict[str, bool]:
    """Forward and backward in a CUDA graph, replayed on other inputs, against an eager call of the same."""
    size = dist.get_world_size()
    leaves, phis, weight = make_inputs(16384, 16, 4, 128)
    plan = ShardPlan.zigzag([0, 16384], size)
    mine = [plan.shard(x, rank).detach().requires_grad_() for x in leaves]
    upstream = plan.shard(weight, rank)

    def step() -> list[torch.Tensor]:
        out = nsa_attention(
            mine[0], BranchKV(*mine[1:7]), mine[7], NSAConfig(), compress_k=phis[0], compress_v=phis[1],
            plan=plan, cp_group=dist.group.WORLD, fetch=FetchOptions(transport="one_sided"),
        )  # fmt: skip
        return [out, *torch.autograd.grad(out, mine, upstream)]

    step()
    step()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        static = step()
    found = {}
    for number in range(3):  # the second eager call is repeated from tapes that the first one recorded
        with torch.no_grad():
            for x in mine:
                x.copy_(torch.rand_like(x) if x is mine[7] else torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.detach().clone() for x in static]
        eager = [x.detach() for x in step()]
        torch.cuda.synchronize()
        for name, a, b in zip(NAMES, replayed, eager, strict=True):
            found[f"{name}, replay {number}"] = torch.equal(a, b)
    return found


LIMIT_S = 10


def lost(rank: int) -> str:
    """The last rank is gone before its third call: what the first one then raises, and after how long."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT_S), dist.group.WORLD)
    leaves, phis, weight = make_inputs(16384, 16, 4, 128)
    plan = ShardPlan.zigzag([0, 16384], dist.get_world_size())
    began = time.monotonic()
    try:
        with naming_the_missing():
            for number in range(100):
                if number == 2 and rank == dist.get_world_size() - 1:
                    time.sleep(LIMIT_S + 10)  # it keeps its memory, as a rank that hangs does; and then is gone
                    return "gone"
                attend(leaves, phis, weight, None, plan, rank, dist.group.WORLD, FetchOptions(transport="one_sided"))
                torch.cuda.synchronize()
                began = time.monotonic()
    except RuntimeError as error:
        return f"{time.monotonic() - began:.1f} s: {error}"
    return "went on"


def chosen(rank: int) -> str:
    """What the ranks choose by themselves, and whether it works."""
    leaves, phis, weight = make_inputs(16384, 16, 4, 128)
    plan = ShardPlan.zigzag([0, 16384], dist.get_world_size())
    attend(leaves, phis, weight, None, plan, rank, dist.group.WORLD, FetchOptions())
    return str(transport_of(dist.group.WORLD, FetchOptions(), torch.device("cuda", torch.cuda.current_device())))


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
