"""A configuration that does not hold: one message with a line for each problem."""

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nsa_dist.train.refused import Refused

M = TypeVar("M", bound=BaseModel)

_MOST_PROBLEMS = 20  # lines of one message
_LONGEST_KEY = 80  # characters of a key that a message repeats
_SECRET = re.compile(
    r"(KEYS?|TOKEN|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PWD|CREDENTIALS?)(_|$)|(^|_)(PASS|AUTH)(_|$)", re.IGNORECASE
)


def parse(model: type[M], raw: Mapping[str, Any], source: str) -> M:
    """`raw` as a `model`. Refused with one line per problem, led by `source` (a file's name)."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [f"  {_describe(model, problem)}" for problem in problems[:_MOST_PROBLEMS]]
        if len(problems) > _MOST_PROBLEMS:
            lines.append(f"  and {len(problems) - _MOST_PROBLEMS} more")
        raise Refused(f"{source} is not a valid configuration:\n" + "\n".join(lines)) from None


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds what nobody should read: WANDB_API_KEY, HF_TOKEN."""
    return _SECRET.search(name) is not None


def _describe(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    path = [_shortened(str(part)) for part in problem["loc"]]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such key{_suggestion(model, path)}"
    if problem["type"] == "missing":
        return f"{where}: this key is needed and has no default; add it"
    message = problem["msg"].removeprefix("Value error, ")
    is_whole = problem["type"] == "value_error" or any(map(is_secret, path))
    given = "" if is_whole else f" (given {_given(problem['input'])})"
    return f"{where}: {message}{given}" if where else message + given


def _given(value: Any) -> str:
    """A value on one line of bounded length, however large or nested it is, or if it holds itself."""
    if isinstance(value, str) and len(value) <= _LONGEST_KEY:
        return repr(value)
    shortener = reprlib.Repr()
    shortener.maxlevel = 2
    return shortener.repr(value)


def _shortened(key: str) -> str:
    return key if len(key) <= _LONGEST_KEY else f"{key[:_LONGEST_KEY]}..."


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
