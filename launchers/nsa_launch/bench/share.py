"""One rank of many: its share of a million tokens in every way, and its memory as the ranks grow."""

import torch

from nsa_dist.bench.show import lines, pictures, timeline
from nsa_dist.bench.show.report import Report, gib, machine
from nsa_dist.bench.solo import measure_share, run_solo
from nsa_launch.bench.request import Request


def run(request: Request) -> bool:
    """Measure, write and draw; whether anything was wrong, which here cannot be."""
    device = torch.device(request.device)
    report = Report(request.out, machine(request.device, 1, "one rank of many, the others made up"))
    _shares(request, report, device)
    if request.memory_curve:
        _memory_curve(request, report, device)
    if request.trace:
        _timeline(request, report, device)
    return report.failed()


def _shares(request: Request, report: Report, device: torch.device) -> None:
    size, rank = request.cp_size, request.rank
    report.say(f"\nRank {rank} of {size}, the others made up: ms forward / backward; GiB at the peak, inputs counted")
    for case in request.sizes.timed(size):
        if request.only not in case.name:
            continue
        if request.left_s <= 0:
            report.leave_out(case.name, "the time is over")
            continue
        for row in run_solo([case], device, rank, request.repeats):
            report.add("shares", row, lines.share(row))


def _memory_curve(request: Request, report: Report, device: torch.device) -> None:
    report.say("\nMemory of a rank as the ranks grow, GiB at the peak of forward and backward, inputs counted")
    for case in request.sizes.memory_curve():
        if request.left_s <= 0:
            report.leave_out(f"memory of {case.name}", "the time is over")
            continue
        for row in run_solo([case], device, 0, repeats=0):
            report.add("memory", row, f"  {row['case']:44} {row.get('error') or gib(row['peak_bytes'])}")
    if request.device == "cuda":
        pictures.draw_memory(report.data, request.out / "memory.png")


def _timeline(request: Request, report: Report, device: torch.device) -> None:
    case = request.sizes.case(request.sizes.tokens[0], request.cp_size)
    row = measure_share(case, device, request.rank, request.repeats, keep_spans=True)
    path = request.out / "timeline.png"
    title = f"One layer, rank {request.rank}, the others made up: {case.name}\n{report.source}"
    timeline.draw(row["spans"], title, path)
    report.say(f"\nwrote {path}")
