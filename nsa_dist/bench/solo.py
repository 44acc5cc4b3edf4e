"""One rank of many on one device: its share of the layer, what it sends and what it needs, the others made up."""

import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from nsa_dist.bench.case import Case
from nsa_dist.bench.layer import layer_forward
from nsa_dist.bench.measure import measure, new_trace
from nsa_dist.bench.selection import Replay, draw_remote, with_selection
from nsa_dist.bench.shard import drawn, make_shard
from nsa_dist.bench.synthetic import SyntheticComm
from nsa_dist.operators import default_ops


def run_solo(cases: Iterable[Case], device: torch.device, rank: int = 0, repeats: int = 3) -> Iterator[dict[str, Any]]:
    """A row for each case. One that fails, out of memory say, is a row with its error."""
    for case in cases:
        row = {**case.as_data(), "rank": rank}
        try:
            yield {**row, **measure_share(case, device, rank, repeats)}
        except torch.cuda.OutOfMemoryError as error:
            yield {**row, "error": f"out of memory: {str(error).splitlines()[0]}"}
        except Exception as error:  # a mode that is broken must not take the others with it
            traceback.print_exc()
            yield {**row, "error": f"{type(error).__name__}: {error}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_share(
    case: Case, device: torch.device, rank: int, repeats: int, keep_spans: bool = False
) -> dict[str, Any]:
    """What `rank`'s share of the case takes; `spans` of the last run, if they are to be kept."""
    plan = case.plan()
    shard = make_shard(case, plan.tokens_per_rank, device, seed=rank)
    draw = drawn(case, rank, device)
    comm = synthetic_comm(case, rank, device)
    forward = layer_forward(case, shard, comm, with_selection(default_ops(shard.q), Replay(draw.block_indices)))
    measured = measure(forward, shard, comm, repeats=repeats)
    spans = {"spans": comm.trace.spans()} if keep_spans and comm.trace else {}
    return {
        "tokens_per_rank": plan.tokens_per_rank,
        "union_fractions": draw.union_fractions,
        "pages": int(draw.remote.sum()),
        **asdict(measured),
        **spans,
    }


def synthetic_comm(case: Case, rank: int, device: torch.device) -> SyntheticComm:
    """The group of the case without its other ranks, who choose as this one does."""
    plan = case.plan()
    wanted = [draw_remote(plan, case.cfg, other, case.union_fraction) for other in range(case.cp_size)]
    return SyntheticComm(
        trace=new_trace(device), num_ranks=case.cp_size, own_rank=rank, bitmaps=torch.stack(wanted).to(device)
    )
