"""`key=value` words of a command line, written over the mapping that a YAML file gave.

    parallel.context_parallel_size=1    a dotted path from the top
    resume=true                         a bare name, when only one section has it
    launch.env.NCCL_DEBUG=INFO          below a mapping any key is new

A value is a YAML scalar or flow collection, `1e-3`, `true`, `null`, `[1, 2]`, `{a: b}`; where a text is wanted it is
the text as it stands: `output_dir=runs/a #1`, `launch.env.NCCL_P2P_DISABLE=1`.
"""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from nsa_dist.train.refused import Refused
from nsa_launch import yaml_values

_DEEPEST = 8  # dots below a key of a section; a name in a mapping may have some


def apply(raw: Mapping[str, Any], overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """A copy of `raw` with every override in place. ValueError on words that name no key of `model`."""
    merged = dict(raw)
    for word in overrides:
        key, text = _split(word)
        path = _path(key, model)
        merged = _put(merged, path, _value(key, text, path, model), key)
    return merged


def _split(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise Refused(
            f"{word!r} is not an override: it must be key=value, so that it names a configuration key; "
            f"for example resume=true or run.steps=100"
        )
    return key, text


def _value(key: str, text: str, path: Sequence[str], model: type[BaseModel]) -> Any:
    annotation: Any = model
    for part in path:
        annotation = yaml_values.below(annotation, part)
    try:
        return yaml_values.read_word(text, annotation)
    except ValueError as error:
        raise Refused(f"the value of {key} is not YAML; quote it, or mend it ({error})") from None


def _path(key: str, model: type[BaseModel]) -> list[str]:
    """The path of a key from the top. A dotted key is one already; the schema judges it later.

    Keys of a mapping may have dots themselves: `launch.label_selector.ray.io/zone=a`.
    """
    if "." in key:
        section, name, *more = key.split(".")
        if len(more) > _DEEPEST:
            raise Refused(f"there is no key {reprlib.repr(key)}; one is section.key, or section.key.name in a mapping")
        annotation = yaml_values.below(yaml_values.below(model, section), name)
        is_mapping = more and yaml_values.below(annotation, "") is not None
        return [section, name, ".".join(more)] if is_mapping else [section, name, *more]
    homes = _homes(model)
    sections = homes.get(key, [])
    if len(sections) == 1:
        return [sections[0], key]
    if sections:
        choices = " or ".join(f"{section}.{key}" for section in sections)
        raise Refused(f"{key!r} is a key of {len(sections)} sections, so the section must be named: {choices}")
    if key in model.model_fields:
        raise Refused(f"{key!r} is a section, not a key: override its keys one by one, as {key}.NAME=value")
    near = difflib.get_close_matches(key, homes, n=1)
    hint = f"did you mean {homes[near[0]][0]}.{near[0]}?" if near else f"the keys are {', '.join(sorted(homes))}"
    raise Refused(f"there is no key {key!r}; {hint}")


def _homes(model: type[BaseModel]) -> dict[str, list[str]]:
    """Every key of every section, with the sections that have it."""
    homes: dict[str, list[str]] = {}
    for section, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name in field.annotation.model_fields:
                homes.setdefault(name, []).append(section)
    return homes


def _put(tree: Mapping[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    copy = dict(tree)
    if len(path) == 1:
        copy[path[0]] = value
        return copy
    below = copy.get(path[0])
    if below is None:
        below = {}
    if not isinstance(below, Mapping):
        raise Refused(
            f"{key!r} goes below {path[0]!r}, which is {reprlib.repr(below)} and not a section; drop the rest of the "
            f"path"
        )
    copy[path[0]] = _put(below, path[1:], value, key)
    return copy
