"""The words of `nsa-dist config`; what they ask for is imported only when they are used."""

import argparse
import sys

from nsa_launch import exit_codes
from nsa_launch.commands.words import help_words


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "config",
        help="every key of a configuration with its value and meaning, as YAML that train takes",
        usage="nsa-dist config [-h] [--keys] [CONFIG.yaml] [key=value ...]",
        **help_words(
            "Print a whole configuration as YAML: the defaults, or what a file says, under the words after it; every "
            "key with its meaning. The output is itself a CONFIG.yaml. Exit codes: 0 printed, 2 refused.",
            "nsa-dist config > my-run.yaml",
            "nsa-dist config configs/tiny-cpu.yaml run.steps=50",
            "nsa-dist config --keys",
        ),
    )
    parser.add_argument("--keys", action="store_true", help="list the keys instead: type, default and meaning")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml, key=value", help="a file, and what overrides it")
    parser.set_defaults(command=_config)


def _config(arguments: argparse.Namespace) -> int:
    from nsa_dist.train.refused import Refused
    from nsa_launch.commands import config

    try:
        print(config.listing(arguments.words) if arguments.keys else config.as_yaml(arguments.words), end="")
    except Refused as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG
    return exit_codes.OK
