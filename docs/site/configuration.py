"""The reference of a run's YAML file, from the models that check it: every key, its type, its default, its meaning."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nsa_launch.config import RunConfig

NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


def tables() -> str:
    """Markdown: a heading and a table for each section of the file."""
    parts = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        parts.append(f"## {name}\n\n{_first_paragraph(section)}\n\n" + "\n".join(_table(section)) + "\n")
    return "\n".join(parts)


def _table(section: type[BaseModel]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        cells = [f"`{name}`", _type(field), _default(field), field.description or ""]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    bounds = [f"{words} {getattr(mark, name):g}" for mark in field.metadata for name, words in [BOUNDS[type(mark)]]]
    return ", ".join([_name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    """
    >>> _name(Literal["a", "b"] | None)
    '`a`, `b`, or null'
    """
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        return f"mapping of {_name(key)} to {_name(value)}"
    if get_origin(annotation) is list:
        return f"list of {_name(get_args(annotation)[0])}"
    if get_origin(annotation) is tuple:
        return f"[{', '.join(map(_name, get_args(annotation)))}]"
    choices = get_args(annotation)
    if choices:
        null = ", or null" if NoneType in choices else ""
        return ", ".join(_name(choice) for choice in choices if choice is not NoneType) + null
    return NAMES[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def _first_paragraph(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").split("\n\n")[0].strip()
