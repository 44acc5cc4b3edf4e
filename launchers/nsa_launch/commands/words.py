"""How every --help looks: a description that is wrapped, and an example at its end that is not."""

import argparse
from typing import Any


class _Lines(argparse.HelpFormatter):
    """Keeps the lines of a text that has several; wraps any other."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.rstrip("\n") if "\n" in text else super()._fill_text(text, width, indent)


def help_words(description: str, *examples: str) -> dict[str, Any]:
    """Arguments of a parser. Each example is a whole command line, a `# comment` at its end allowed."""
    title = "example:" if len(examples) == 1 else "examples:"
    epilog = "\n".join([title, *(f"  {example}" for example in examples)]) + "\n"
    return {"description": description, "epilog": epilog, "formatter_class": _Lines}
