"""`key=value` words of a command line, written over the mapping that a YAML file gave.

    parallel.context_parallel_size=1    a dotted path from the top
    resume=true                         a bare name, when only one section has it
    launch.env.NCCL_DEBUG=INFO          below a mapping any key is new

Values are YAML scalars or flow collections: `1e-3`, `true`, `null`, `[1, 2]`, `{a: b}`.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel


def apply(raw: Mapping[str, Any], overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """A copy of `raw` with every override in place. ValueError on words that name no key of `model`."""
    merged = dict(raw)
    for word in overrides:
        key, value = _split(word)
        path = _path(key, model)
        merged = _put(merged, path, value, word)
    return merged


def _split(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(
            f"{word!r} is not an override: it must be key=value, so that it names a configuration key; "
            f"for example resume=true or run.steps=100"
        )
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"the value of {word!r} is not YAML; quote it, for example {key}='\"{text}\"'") from None


def _path(key: str, model: type[BaseModel]) -> list[str]:
    """The path of a key from the top. A dotted key is one already; the schema judges it later."""
    if "." in key:
        return key.split(".")
    homes = _homes(model)
    sections = homes.get(key, [])
    if len(sections) == 1:
        return [sections[0], key]
    if sections:
        choices = " or ".join(f"{section}.{key}" for section in sections)
        raise ValueError(f"{key!r} is a key of {len(sections)} sections, so the section must be named: {choices}")
    if key in model.model_fields:
        raise ValueError(f"{key!r} is a section, not a key: override its keys one by one, as {key}.NAME=value")
    near = difflib.get_close_matches(key, homes, n=1)
    hint = f"did you mean {homes[near[0]][0]}.{near[0]}?" if near else f"the keys are {', '.join(sorted(homes))}"
    raise ValueError(f"there is no key {key!r}; {hint}")


def _homes(model: type[BaseModel]) -> dict[str, list[str]]:
    """Every key of every section, with the sections that have it."""
    homes: dict[str, list[str]] = {}
    for section, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name in field.annotation.model_fields:
                homes.setdefault(name, []).append(section)
    return homes


def _put(tree: Mapping[str, Any], path: list[str], value: Any, word: str) -> dict[str, Any]:
    copy = dict(tree)
    if len(path) == 1:
        copy[path[0]] = value
        return copy
    below = copy.get(path[0])
    if below is None:
        below = {}
    if not isinstance(below, Mapping):
        raise ValueError(
            f"{word!r} goes below {path[0]!r}, which is {below!r} and not a section; drop the rest of the path"
        )
    copy[path[0]] = _put(below, path[1:], value, word)
    return copy
