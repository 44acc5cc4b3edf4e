"""The reference of the command line: what every command's --help says, from the parsers themselves."""

import argparse
import inspect
import os
from collections.abc import Iterator

from nsa_launch import cli, torchrun


def sections() -> str:
    """Markdown: a heading and the --help of each command."""
    os.environ["COLUMNS"] = "100"  # argparse fits its lines into it
    parts = [*_sections(cli._parser()), f"## torchrun\n\n{_literal(inspect.getdoc(torchrun) or '')}"]
    return "\n".join(parts)


def _sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {parser.prog}\n\n{_literal(parser.format_help())}"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _sections(command)


def _literal(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"
