"""The words of `nsa-dist plan`; what they ask for is imported only when they are used."""

import argparse
import sys
from pathlib import Path

from nsa_launch import exit_codes
from nsa_launch.commands.words import help_words


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "plan",
        help="before a run: will it fit, how long is a step, which context-parallel size",
        **help_words(
            "Whether a configuration fits a cluster, with which context-parallel size, and how long a step takes, in "
            "three lines; with --full memory, bytes and seconds by kind for every size, and each constant's source. "
            "Nothing is started. Exit codes: 0 planned, whatever the verdict, 2 refused.",
            "nsa-dist plan configs/long-1m.yaml",
            "nsa-dist plan configs/long-1m.yaml sequence_length=2097152 --nodes 2 --full",
            "nsa-dist plan configs/long-1m.yaml --context 1048576 --sequences 8   # the cache of inference",
        ),
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example sequence_length=262144")
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help="YAML of GPUs and links; default: the package's h200-8.yaml"
    )
    parser.add_argument(
        "--bench",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="what was measured instead of the cluster file's constants: bench.json of the kernels' benchmark, cp.json "
        "of nsa-dist bench cp; may be given several times, the last counts",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="plan for N nodes instead of the cluster file's number")
    parser.add_argument("--cp", type=_sizes, metavar="1,2,4", help="context-parallel sizes; default: all that divide")
    parser.add_argument(
        "--u",
        type=_fractions,
        default=(1.0, 0.2, 0.05),
        metavar="1,0.2",
        help="shares of the remote blocks chosen; memory is judged by the first (default 1,0.2,0.05)",
    )
    parser.add_argument("--overlap", type=float, default=0.0, metavar="0..1", help="share of wire time hidden")
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="what the model's cache takes in inference, so many tokens long"
    )
    parser.add_argument("--sequences", type=int, metavar="B", help="sequences of that length; default 1")
    parser.add_argument("--full", action="store_true", help="the tables, the constants and every sentence, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw memory and step time here")
    parser.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from nsa_launch.commands import plan

    try:
        plan.run(plan.Request.of(arguments))
    except ValueError as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG
    return exit_codes.OK


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))
