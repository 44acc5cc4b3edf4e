"""Turn a mapping into a checked section, or into one error that a person can act on."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], raw: Mapping[str, Any], source: str) -> M:
    """`raw` as a `model`. ValueError with one line per problem, led by `source` (a file's name)."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {_describe(model, problem)}" for problem in error.errors()]
        raise ValueError(f"{source} is not a valid configuration:\n" + "\n".join(lines)) from None


def _describe(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such key{_suggestion(model, path)}"
    if problem["type"] == "missing":
        return f"{where}: this key is needed and has no default; add it"
    message = problem["msg"].removeprefix("Value error, ")
    given = f" (given {problem['input']!r})" if problem["type"] != "value_error" else ""
    return f"{where}: {message}{given}" if where else message + given


def _suggestion(model: type[BaseModel], path: list[str]) -> str:
    """The nearest key beside the unknown one, or the section that has a key of this name."""
    siblings = _fields(model, path[:-1])
    near = difflib.get_close_matches(path[-1], siblings, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    homes = [name for name in _fields(model, []) if path[-1] in _fields(model, [name])]
    if homes:
        return f" here; it belongs to the section {homes[0]!r}"
    return f"; the keys here are {', '.join(siblings)}"


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    current: Any = model
    for part in path:
        field = current.model_fields.get(part)
        current = field.annotation if field is not None else None
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return []
    return list(current.model_fields)
