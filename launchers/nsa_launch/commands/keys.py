"""Every key of a configuration file with type, default and meaning, read from the models that check it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nsa_launch.yaml_values import alternatives

_NAMES = {int: "int", float: "float", bool: "bool", str: "text", Path: "path", NoneType: "null"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # attributes of what pydantic keeps of a Field


@dataclass(frozen=True)
class Key:
    """One key of a section. `default` is a value as YAML has them; where `needed`, an example."""

    name: str
    type: str
    default: Any
    meaning: str
    needed: bool


@dataclass(frozen=True)
class SectionKeys:
    """One section of a file."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def sections(model: type[BaseModel]) -> Iterator[SectionKeys]:
    """Those of `model`, in the order in which it has them."""
    for name, field in model.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        keys = tuple(_key(key, info) for key, info in section.model_fields.items())
        yield SectionKeys(name, (section.__doc__ or "").partition("\n")[0], keys)


def _key(name: str, field: FieldInfo) -> Key:
    assert field.description, f"{name} says nowhere what it means"
    needed = field.is_required()
    default = (field.examples or [None])[0] if needed else field.get_default(call_default_factory=True)
    return Key(name, _type(field), default, field.description, needed)


def _type(field: FieldInfo) -> str:
    """`int >= 1`, `fp32 | bf16`, `float > 0 | null`."""
    bounds = [
        f"{sign} {getattr(b, name)}" for b in field.metadata for name, sign in _BOUNDS.items() if hasattr(b, name)
    ]
    words = [_word(part) for part in alternatives(field.annotation)]
    words[0] += "".join(f" {bound}" if i == 0 else f", {bound}" for i, bound in enumerate(bounds))
    return " | ".join(words)


def _word(part: Any) -> str:
    if isinstance(part, str):  # of a Literal
        return part
    if get_origin(part) is dict:
        of, to = (" | ".join(map(_word, alternatives(argument))) for argument in get_args(part))
        return f"{{{of}: {to}}}"
    if get_origin(part) is list:
        return f"[{_word(get_args(part)[0])}, ...]"
    if get_origin(part) is tuple:
        return f"[{', '.join(map(_word, get_args(part)))}]"
    return _NAMES[part]
