"""Time every branch and the whole layer, forward and backward, beside dense causal attention, checked before timed.

    python kernels/bench/run.py --out runs/bench --jobs 8              the table of kernels/README.md
    python kernels/bench/run.py --out runs/bench --preset full         all sizes
    python kernels/bench/run.py --out runs/bench --preset full --only 1024k

Every result is compared with the reference on sampled rows first; a wrong one gets no time, and makes the exit status
1. A case that runs out of memory, or out of the budget, says so and the next one is taken. The table is printed and
written to OUT/bench.txt as it grows, all figures to OUT/bench.json, the README's table to OUT/bench.md.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import triton
from bench_cases import PRESETS
from bench_compile import compile_cases
from bench_measure import measure_case
from bench_report import Report
from bench_timing import Timer, ceilings


def main() -> int:
    args = _arguments()
    if not torch.cuda.is_available():
        sys.exit("the benchmark times Triton kernels, so it needs a CUDA device, and torch sees none; run it on one")
    began = time.monotonic()
    cases = [case for case in PRESETS[args.preset] if args.only in case.name]
    if not cases:
        names = ", ".join(case.name for case in PRESETS[args.preset])
        sys.exit(
            f"--only {args.only!r} is part of no case of --preset {args.preset}, so nothing would run; cases: {names}"
        )
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
    return 1 if report.failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench.txt and bench.json")
    parser.add_argument("--preset", choices=PRESETS, default="table")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--budget-s", type=float, default=500.0, help="start no case after so many seconds")
    parser.add_argument("--seconds-each", type=float, default=0.2, help="device time of one measurement")
    parser.add_argument(
        "--dense-limit-s", type=float, default=5.0, help="leave dense attention out where it takes longer"
    )
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile the kernels first, at once")
    return parser.parse_args()


def _machine(timer: Timer) -> dict:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python", *sys.argv]),
        **ceilings(timer),
    }


if __name__ == "__main__":
    sys.exit(main())
