"""The command line: `nsa-dist train CONFIG.yaml [key=value ...]`, `data`, `plan`, `report`, `generate` and more.

Imports are inside the commands, so that --help and mistakes answer at once.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nsa_launch import exit_codes
from nsa_launch.bench import arguments as bench_arguments
from nsa_launch.commands import (
    config_arguments,
    data_arguments,
    export_arguments,
    plan_arguments,
    report_arguments,
)
from nsa_launch.commands.convert import arguments as convert_arguments
from nsa_launch.commands.words import help_words
from nsa_launch.jobs import arguments as job_arguments

_OPTIONAL = {"megatron", "psutil", "pydantic", "rich", "tensorboard", "matplotlib", "ray"}  # of pyproject.toml's extras


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`nsa_launch.exit_codes`)."""
    arguments = parser().parse_args(argv)
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read it has seen enough, as in `nsa-dist plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return exit_codes.stopped_by(signal.SIGPIPE)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _OPTIONAL:
            raise
        print(f"nsa-dist: {_not_installed(missing)}", file=sys.stderr)
        return exit_codes.BAD_CONFIG


def _not_installed(package: str) -> str:
    return (
        f"this command needs {package}, which is not installed here: nsa-dist alone asks only for what the attention "
        f"needs; pip install 'nsa-dist[ray]', or in a checkout pip install --editable '.[ray]', brings it"
    )


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    made = argparse.ArgumentParser(
        prog="nsa-dist",
        **help_words("Context-parallel Native Sparse Attention.", "nsa-dist train configs/tiny-cpu.yaml run.steps=50"),
    )
    made.add_argument("--version", action=_Version, help="show the version and exit")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train through Ray as a YAML file says",
        **help_words(
            "Start or join Ray and train. Exit codes: 0 done, 1 failed, 2 refused, 75 no room in the cluster "
            "(submit again), 130 or 143 stopped by Ctrl-C or SIGTERM after a checkpoint.",
            "nsa-dist train configs/tiny-cpu.yaml run.steps=50 output_dir=runs/first",
            "nsa-dist train runs/first/config.yaml resume=true   # go on from its last checkpoint",
        ),
    )
    train.add_argument("config", type=Path, metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example resume=true or run.steps=100")
    train.set_defaults(command=_train)
    data_arguments.register(commands)
    plan_arguments.register(commands)
    config_arguments.register(commands)
    report_arguments.register(commands)
    job_arguments.register(commands)
    convert_arguments.register(commands)
    export_arguments.register(commands)
    bench_arguments.register(commands)
    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, and what each part will therefore do",
        **help_words(
            "Cores, memory, packages, GPUs, and which path each part takes because of them. Exit codes: 0 all that "
            "training needs is here, 1 something is missing.",
            "nsa-dist doctor",
        ),
    )
    doctor.set_defaults(command=_doctor)
    return made


class _Version(argparse.Action):
    """Imports the package only when asked."""

    def __init__(self, **words: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **words)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from nsa_dist import __version__

        print(f"nsa-dist {__version__}")
        parser.exit()


def _train(arguments: argparse.Namespace) -> int:
    from nsa_dist.train.refused import Refused
    from nsa_launch import run_folder
    from nsa_launch.commands import doctor
    from nsa_launch.config import load
    from nsa_launch.on_ray import driver as ray_driver
    from nsa_launch.processes import check_groups

    with ExitStack() as stack:
        try:
            config = load(arguments.config, arguments.overrides)
            check_groups(config)
            run_folder.check(config)  # both before torch is imported, which counts GPUs, and takes longer than they do
            plan = ray_driver.plan(config, doctor.machine(with_gpus=config.launch.device != "cpu"))
            folder = stack.enter_context(run_folder.claimed(config))
        except (Refused, ConnectionError) as error:
            print(f"nsa-dist: {error}", file=sys.stderr)
            return exit_codes.BAD_CONFIG
        except KeyboardInterrupt:
            return exit_codes.stopped_by(signal.SIGINT)
        return ray_driver.run(plan, folder)


def _doctor(_: argparse.Namespace) -> int:
    from nsa_launch.commands import doctor

    return doctor.report()
