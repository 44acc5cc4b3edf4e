"""Docstrings as Markdown: what is aligned in columns stays as it was typed, and a field's comment is its docstring."""

import re
from typing import Any

from griffe import Docstring, Extension, GriffeLoader, Object

COLUMNS = re.compile(r"^\S.*?\S {2,}\S|^ {2,}\S", re.MULTILINE)  # a line with a gap in it, or an indented one
COMMENT = re.compile(r" {2}# (?!type:|noqa)(.+)$")  # what a dataclass says of a field
CODE = re.compile(r"(`[^`]*`)")


class AlignedText(Extension):
    """Shapes, units and arguments stand in columns in our docstrings, which Markdown would run together."""

    def on_object(self, *, obj: Object, loader: GriffeLoader, **_: Any) -> None:
        """Called by griffe for every object it has read."""
        if obj.docstring is not None:
            obj.docstring = Docstring(markdown(obj.docstring.value), lineno=obj.docstring.lineno, parent=obj)
        elif obj.is_attribute and (comment := COMMENT.search("".join(obj.lines[:1]))):
            obj.docstring = Docstring(comment[1], parent=obj)


def markdown(text: str) -> str:
    """Paragraphs in columns as literal text, examples as Python, the others with their stars kept.

    >>> markdown("a * b\\n\\nx    [T]   tokens")
    'a \\\\* b\\n\\n```text\\nx    [T]   tokens\\n```'
    """
    return "\n\n".join(map(_paragraph, text.split("\n\n")))


def _paragraph(text: str) -> str:
    if text.startswith(">>>"):
        return f"```pycon\n{text}\n```"
    if COLUMNS.search(text) and not text.startswith("- "):
        return f"```text\n{text}\n```"
    parts = CODE.split(text)
    parts[::2] = [part.replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)
