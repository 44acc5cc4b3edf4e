"""The reference of the command line: what every command's --help says, from the parsers themselves."""

import argparse
import ast
import os
from collections.abc import Iterator
from pathlib import Path

from nsa_launch import cli

TORCHRUN = Path(cli.__file__).with_name("torchrun.py")  # read, for importing it would import Megatron-core


def sections() -> str:
    """Markdown: a heading and the --help of each command."""
    os.environ["COLUMNS"] = "100"  # argparse fits its lines into it
    of_torchrun = ast.get_docstring(ast.parse(TORCHRUN.read_text(encoding="utf-8"))) or ""
    return "\n".join([*_sections(cli.parser()), f"## torchrun\n\n{_literal(of_torchrun)}"])


def _sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {parser.prog}\n\n{_literal(parser.format_help())}"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _sections(command)


def _literal(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"
