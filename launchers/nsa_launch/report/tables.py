"""Tables of a report, and what may be put into them from records that may hold anything."""

from collections.abc import Sequence
from html import escape
from typing import Any


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), is_html: bool = False) -> str:
    """Of texts, which are escaped unless they are HTML already."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if is_html else escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{f'<tr>{top}</tr>' if head else ''}{body}</table>"


def mapping(value: Any) -> dict[str, float]:
    """The numbers of a mapping by their names; nothing where there is none."""
    if not isinstance(value, dict):
        return {}
    return {str(name): number for name, number in value.items() if isinstance(number, int | float)}


def number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "unknown"
