"""The words of `nsa-dist report`; what they ask for is imported only when they are used."""

import argparse
import sys
from pathlib import Path

from nsa_launch import exit_codes
from nsa_launch.commands.words import help_words


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "report",
        help="one run on one page: losses, traffic, failures, configuration, and where everything is",
        **help_words(
            "Write RUN/report.html, one file that needs no network, from what is in the run's folder, whether it has "
            "ended or not. A run writes its own when it ends. Exit codes: 0 written, 2 refused.",
            "nsa-dist report runs/first",
            "nsa-dist report runs/first --out first.html",
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, its output_dir")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write here instead of RUN/report.html")
    parser.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from nsa_dist.train.refused import Refused
    from nsa_launch.report import page
    from nsa_launch.run_folder import RunFolder

    try:
        print(page.write(RunFolder(arguments.run.absolute()), arguments.out))
    except (Refused, OSError) as error:
        print(f"nsa-dist: {_said(error)}", file=sys.stderr)
        return exit_codes.BAD_CONFIG
    return exit_codes.OK


def _said(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the report cannot be written ({error.strerror}: {error.filename}); name another file with --out"
    return str(error)
