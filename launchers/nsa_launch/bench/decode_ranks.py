"""`nsa-dist bench decode` over real ranks: each case in a team of processes, one a rank."""

from itertools import product
from typing import get_args

import torch

from nsa_dist.bench.decode.over_ranks import DecodeOverRanks
from nsa_dist.bench.decode.run import DecodeRequest
from nsa_dist.bench.show.report import Report, Row, machine
from nsa_dist.bench.world import Place
from nsa_dist.inference.pool import CmpPlacement
from nsa_launch.bench.team import TaskFailed, Team

_MOST_S = 180.0
_HEADER = f"{'':>16} {'compressed rows':<16}{'exchanges':>11}"
_HEADER += f"{'graph':>9}{'alone':>9}{'exchange':>10}{'one rank':>10}{'call':>10}{'kB sent':>9}"
_TIMES = ("graph_s", "nothing_sent_s", "exchange_s", "one_rank_s", "call_s")


def run(request: DecodeRequest, place: Place) -> bool:
    """Whether a result was wrong. A case that fails is a row that says so."""
    where = "sharing one device" if place.shared else "a GPU each"
    ranks = f"one layer, one new token a sequence, over {place.num_ranks} ranks by {place.backend}, {where}"
    report = Report(request.out, machine(place.device, 1 if place.shared else place.num_ranks, ranks), "decode-ranks")
    report.say(
        "us of the slowest rank, medians; compressed rows: replicated, on every rank, or sharded, each on one; "
        "exchanges: all-gathers of a step; alone: the same graph with nothing sent; exchange: its all-gathers alone; "
        "one rank: a graph on one GPU that has all"
    )
    report.say(_HEADER)
    with Team(place) as team:
        for case, placement in product(request.cases(place.device == "cuda"), request.placements):
            try:
                rows = team.run(DecodeOverRanks(case, placement), min(request.budget_s, _MOST_S))
            except TaskFailed as error:
                report.leave_out(f"{case.name}, {placement}", str(error))
                continue
            row = case.as_data() | {"cp_size": place.num_ranks} | _slowest(rows)
            report.add("cases", row, _line(row))
    return any(row["wrong"] for row in report.data.get("cases", []))


def placements(given: CmpPlacement | None, is_fp8: bool, place: Place | None) -> tuple[CmpPlacement, ...]:
    """Of compressed rows, in turn. ValueError for one that would mean nothing or that a cache refuses."""
    if given and place is None:
        raise ValueError(
            f"--cmp-placement {given} was given without --gpus or --ranks, but on one rank compressed rows lie with "
            f"all else; leave it out, or give --gpus all"
        )
    if given == "sharded" and is_fp8:
        raise ValueError(
            "--cmp-placement sharded was given with --fp8, but a cache whose compressed rows are sharded takes no "
            "pages of 8 bits; leave one of them out"
        )
    every: tuple[CmpPlacement, ...] = ("replicated",) if is_fp8 else get_args(CmpPlacement)
    return (given,) if given else every


def device_of(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _slowest(rows: list[Row]) -> Row:
    wrong = [f"rank {rank}: {row['wrong']}" for rank, row in enumerate(rows) if row["wrong"]]
    found = {name: max(row[name] for row in rows) for name in _TIMES if all(name in row for row in rows)}
    return {**rows[0], **found, "wrong": "; ".join(wrong) or None, "ranks": rows}


def _line(row: Row) -> str:
    name = f"{row['case']:>16} {row['cmp_placement']:<16}{row['exchanges']:>11}"
    if row["wrong"]:
        return f"{name}  WRONG: {row['wrong']}"
    widths = (9, 9, 10, 10, 10)
    cells = (f"{1e6 * row[t]:>{w},.1f}" if t in row else f"{'-':>{w}}" for t, w in zip(_TIMES, widths, strict=True))
    return f"{name}{''.join(cells)}{sum(row['sent_bytes'].values()) / 1e3:>9,.1f}"
