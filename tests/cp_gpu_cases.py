"""Several ranks on one GPU over gloo, with the Triton kernels, against one rank: what tests/cp/test_gpu.py runs."""

import itertools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import cp_truth
from kernels.judge import assert_twice, rms
from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.compress import CompressMLP
from nsa_dist.cp.comm import Traffic
from nsa_dist.cp.options import FetchOptions
from ranks import groups_up_to
from thread_ranks import run_threads

NAMES = ("out", "dq", *(f"d{name}" for name in BranchKV._fields), "dgates")
BUDGETS = (2**24, 2**22)  # rounds of 256 and of 64 pages


def make_inputs(num_tokens: int, num_q_heads: int, num_kv_heads: int, dim: int) -> tuple[list, list, torch.Tensor]:
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device="cuda").bfloat16()

    leaves = [normal(num_tokens, num_q_heads, dim), *(normal(num_tokens, num_kv_heads, dim) for _ in range(6))]
    leaves.append(torch.rand(num_tokens, num_q_heads, 3, generator=gen, device="cuda"))
    torch.manual_seed(0)
    phis = [CompressMLP(num_kv_heads, dim, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return leaves, phis, normal(num_tokens, num_q_heads, dim)


def attend(leaves, phis, weight, cu_seqlens, plan=None, rank=0, group=None, fetch=None):
    """(out, block_indices, gradients of q, six of K/V, gates) of one rank's shard."""
    leaves = [(x if plan is None else plan.shard(x, rank)).detach().requires_grad_() for x in leaves]
    weight = weight if plan is None else plan.shard(weight, rank)
    out, ids = nsa_attention(
        leaves[0], BranchKV(*leaves[1:7]), leaves[7], NSAConfig(), compress_k=phis[0], compress_v=phis[1],
        cu_seqlens=None if plan else cu_seqlens, plan=plan, cp_group=group, fetch=fetch, return_block_indices=True,
    )  # fmt: skip
    grads = torch.autograd.grad(out, leaves, weight)
    return out.detach(), ids, grads


def compare(rank: int, cases: dict[str, tuple]) -> dict[tuple, dict]:
    """For each (case, cp_size, layout) what this rank found: what has the bits of one rank, and what errs too much.

    cases   cp_sizes, document lengths and (Hq, Hkv, D) by name
    """
    torch.cuda.set_device(0)
    groups, result = groups_up_to(dist.get_world_size()), {}
    for name, (sizes, lengths, heads) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            for key, found in _compare(rank, sizes, lengths, heads, groups, _agreed(folder)).items():
                result[name, *key] = found
            dist.barrier()
        torch.cuda.empty_cache()
    return result


def _compare(rank: int, sizes: list[int], lengths: list[int], heads: tuple, groups: dict, folder: Path):
    if rank >= max(sizes):
        dist.barrier()
        dist.barrier()
        return {}
    leaves, phis, weight = make_inputs(sum(lengths), *heads)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    if rank > 0:
        dist.barrier()  # rank 0 compiles for all, and then has the truth to find
    expected = attend(leaves, phis, weight, bounds)
    one = [expected[0], *expected[2]]
    if rank == 0:
        dist.barrier()
        given = leaves, phis, weight, expected[1], NSAConfig(), bounds
        exact, plain = cp_truth.truth(*given, torch.float32), cp_truth.plain(*given, torch.bfloat16)
        worse = _worse(one, plain, exact)
        torch.save([x.cpu() for x in (*exact, *plain)], folder / "truth")
        del exact, plain
        torch.cuda.empty_cache()
    dist.barrier()
    on_disk = torch.load(folder / "truth", mmap=True)
    result = {(1, "alone"): {"worse": worse}} if rank == 0 else {}
    for size, layout in itertools.product(sizes, ("zigzag", "contiguous")):
        if rank >= size:
            continue
        plan = getattr(ShardPlan, layout)(bounds, size)
        real = ~plan.padding(rank).cuda()

        def mine(xs: list, plan=plan, real=real) -> list:
            return [plan.shard(x, rank).cuda()[real] for x in xs]

        def run(budget: int | None = None, plan=plan, size=size, real=real):
            fetch = FetchOptions(kv_fetch_budget_bytes=budget)
            out, ids, grads = attend(leaves, phis, weight, bounds, plan, rank, groups[size], fetch)
            return ids[real].long(), [x[real] for x in (out, *grads)]

        (ids, got), (_, again) = run(), run()
        wanted, truth = mine(one), mine(on_disk)
        exact, plain = truth[: len(NAMES)], truth[len(NAMES) :]
        result[size, layout] = {
            "ids": torch.equal(ids, mine([expected[1].long() + 1])[0] - 1),
            "same": [n for n, a, b in zip(NAMES, got, wanted, strict=True) if torch.equal(a, b)],
            "repeats": [n for n, a, b in zip(NAMES, got, again, strict=True) if torch.equal(a, b)],
            "worse": _worse(got, plain, exact),
            "worse than one rank": _less_exact(got, wanted, exact),
            "worse in rounds": {budget: _worse(run(budget)[1], plain, exact) for budget in BUDGETS},
        }
    return result


def _agreed(folder: str) -> Path:
    """Rank 0's folder, on every rank."""
    told = [folder]
    dist.broadcast_object_list(told)
    return Path(told[0])


def _worse(actual: list, plain: list, exact: list) -> list[str]:
    """What breaks the twice rule, in words."""
    found = []
    for name, a, p, e in zip(NAMES, actual, plain, exact, strict=True):
        try:
            assert_twice(name, a, p, e)
        except AssertionError as error:
            found.append(str(error))
    return found


def _less_exact(actual: list, one_rank: list, exact: list) -> list[str]:
    """What errs more than one rank does, by more than a tenth of the root mean square."""
    found = []
    for name, a, o, e in zip(NAMES, actual, one_rank, exact, strict=True):
        error, allowed = rms(a - e), 1.1 * rms(o - e)
        if error > allowed:
            found.append(f"{name}: rms error {error:.3e}, one rank's and a tenth {allowed:.3e}")
    return found


def synchronisations(num_kv_heads: int) -> dict[str, str]:
    """What torch says where the host would wait for the device in line: "" if it does not.

    forward, backward   of two ranks as threads, so that no transport is in the way
    control             of a copy that does wait
    sent                the kinds of what the ranks sent while torch watched

    The wait for the bits of the selection, an event that has come while the next stage was queued, is not one of those
    that torch reports.
    """
    leaves, phis, weight = make_inputs(8192, 16, num_kv_heads, 128)
    plan, watched = ShardPlan.zigzag([0, 8192], 2), Traffic()
    shards = [[plan.shard(x, rank).detach().requires_grad_() for x in leaves] for rank in range(2)]
    grad_out = [plan.shard(weight, rank) for rank in range(2)]

    def forward(comm):
        own = shards[comm.rank]
        return nsa_attention(
            own[0], BranchKV(*own[1:7]), own[7], NSAConfig(), compress_k=phis[0], compress_v=phis[1],
            plan=plan, cp_group=comm, traffic=watched,
        )  # fmt: skip

    def both(comm):
        return torch.autograd.grad(forward(comm), shards[comm.rank], grad_out[comm.rank])

    run_threads(2, both)  # kernels are compiled and layouts made
    watched.sent_bytes.clear()
    runs = {
        "forward": lambda: run_threads(2, forward),
        "backward": lambda: run_threads(2, both),
        "control": lambda: weight.flatten()[0].item(),
    }
    found = {name: _complaint(run) for name, run in runs.items()}
    return found | {"sent": " ".join(sorted(watched.sent_bytes))}


def _complaint(run: Callable[[], object]) -> str:
    """What torch, told to refuse every wait, says of `run`, and where."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return "".join(traceback.format_tb(error.__traceback__)[-3:]) + str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""
