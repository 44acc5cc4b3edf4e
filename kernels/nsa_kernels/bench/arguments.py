"""The words of the benchmark's command line. Imports nothing heavy, so that --help answers at once."""

import argparse
from pathlib import Path

from nsa_kernels.bench.cases import PRESETS

DESCRIPTION = """\
Time every branch and the whole layer, forward and backward, beside dense causal attention, checked before timed.

Every result is compared with the reference on sampled rows first; a wrong one gets no time, and makes the exit status
1. A case that runs out of memory, or out of the budget, says so and the next one is taken. The table is printed and
written to OUT/bench.txt as it grows, all figures to OUT/bench.json, the README's table to OUT/bench.md.

--compare holds the figures to those of an earlier bench.json of the same card, line by line of the table: slower by
more than 5% and the spread of both measurements' runs, or not measured at all, makes the exit status 1. The table of
that is written to OUT/compare.txt. 2: refused.
"""

EXAMPLES = """\
examples:
  {command} --out runs/bench --jobs 8                     # the table of kernels/README.md
  {command} --out runs/bench --preset full --only 1024k   # of all sizes those of this length
  {command} --out runs/bench --compare kernels/bench/baseline-h200.json
"""


def parser() -> argparse.ArgumentParser:
    """Of the script kernels/bench/run.py."""
    command = "python kernels/bench/run.py"
    made = argparse.ArgumentParser(
        prog=command,
        description=DESCRIPTION,
        epilog=EXAMPLES.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(made)
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `nsa_kernels.bench.run.run` takes."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--preset", choices=PRESETS, default="table", help="which cases (default table)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this text")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="bench.json of an earlier run on the same card, to be held to"
    )
    parser.add_argument(
        "--budget-s", type=float, default=500.0, metavar="S", help="start no case after so long (default 500)"
    )
    parser.add_argument(
        "--seconds-each", type=float, default=0.2, metavar="S", help="device time of one measurement (default 0.2)"
    )
    parser.add_argument(
        "--dense-limit-s", type=float, default=5.0, metavar="S", help="leave out dense attention that takes longer"
    )
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="compile the kernels first, in so many processes"
    )
