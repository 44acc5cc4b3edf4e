"""START HERE: one run of the benchmark. Its words and files: `nsa_kernels.bench.arguments`."""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from nsa_kernels.bench import arguments
from nsa_kernels.bench.cases import PRESETS, Case
from nsa_kernels.bench.compare import Stored
from nsa_kernels.bench.compile import compile_cases
from nsa_kernels.bench.measure import measure_case
from nsa_kernels.bench.report import Report
from nsa_kernels.bench.timing import Timer, ceilings

Machine = dict[str, str | float]


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 0 measured, 1 a result is wrong or slower than the stored one, 2 refused."""
    try:
        return run(arguments.parser().parse_args(words))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Measure, print and write. ValueError, before anything runs, for what cannot be measured or compared."""
    cases = _chosen(args.preset, args.only)
    stored = None if args.compare is None else Stored.read(args.compare)
    if not torch.cuda.is_available():
        raise ValueError(
            "the benchmark times Triton kernels, so it needs a CUDA device, and torch sees none; run it on one"
        )
    if stored is not None:
        stored.check(torch.cuda.get_device_name(), [case.name for case in cases])
    report = _measure(args, cases)
    if stored is None:
        return int(report.failed)
    comparison = stored.compare(report.machine, report.cases)
    report.add_comparison(comparison.text())
    return int(report.failed or comparison.failed)


def _measure(args: argparse.Namespace, cases: list[Case]) -> Report:
    began = time.monotonic()
    if args.jobs:
        compile_cases(cases, args.jobs)
    timer = Timer(args.seconds_each)
    report = Report(args.out, _machine(timer))
    for case in cases:
        spent = time.monotonic() - began
        if spent > args.budget_s:
            report.add(case, [{"step": "all", "note": f"skipped: {spent:.0f} s of {args.budget_s:.0f} s are spent"}])
            continue
        report.add(case, measure_case(case, timer, dense_limit_s=args.dense_limit_s))
    return report


def _chosen(preset: str, only: str) -> list[Case]:
    cases = [case for case in PRESETS[preset] if only in case.name]
    if not cases:
        names = ", ".join(case.name for case in PRESETS[preset])
        raise ValueError(
            f"--only {only!r} is part of no case of --preset {preset}, so nothing would run; take a part of one of "
            f"these, or another --preset: {names}"
        )
    return cases


def _machine(timer: Timer) -> Machine:
    import triton  # not on every machine that is told so above

    return {
        "device": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python", *sys.argv]),
        **ceilings(timer),
    }
