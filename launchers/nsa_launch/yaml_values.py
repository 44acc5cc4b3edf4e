"""YAML as a configuration means it, read along the models that will check it.

A text stays as it is written: `NCCL_P2P_DISABLE: 1` is "1", `output_dir: 2026-11-28` no date. A number is what it looks
like: `020` is 20 and `1:30` no number, where YAML 1.1 has 16 and 90. A key given twice is an error, and so is a key
that is no scalar. `<<: *base` merges.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

_TAG = "tag:yaml.org,2002:"
_NULLS = ("null", "Null", "NULL", "~")
_MOST_DIGITS = 40  # a longer whole number stays a text, which the checks refuse


def read(text: str, annotation: Any = None) -> Any:
    """The only document of `text`, its scalars typed along `annotation`, a model's or a field's. ValueError."""
    return _guarded(lambda loader: _document(loader, annotation), text)


def read_word(text: str, annotation: Any = None) -> Any:
    """The value of a command line's word: no comment in it, and where a text is wanted no YAML but its quotes."""
    is_list = text.lstrip().startswith("[") and any(get_origin(part) is list for part in alternatives(annotation))
    if is_list or not _is_text(annotation):
        value = read(text, annotation)
        _refuse_comment(text)
        return value
    word = text.strip()
    if word in _NULLS and NoneType in alternatives(annotation):
        return None
    return _unquoted(word)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Of a union, or of a Literal, its members; else the annotation alone."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(part for member in get_args(annotation) for part in alternatives(member))
    return get_args(annotation) if get_origin(annotation) is Literal else (annotation,)


def below(annotation: Any, key: str) -> Any:
    """What the value of `key` is annotated with below `annotation`; None where nothing is known of it."""
    for part in alternatives(annotation):
        if get_origin(part) is dict:
            return get_args(part)[1]
        if isinstance(part, type) and issubclass(part, BaseModel):
            field = part.model_fields.get(key)
            return None if field is None else field.annotation
    return None


def _is_text(annotation: Any) -> bool:
    """A str, a Path, or one of some words, and no number beside them; None does not matter."""
    parts = alternatives(annotation)
    return any(part in (str, Path) or isinstance(part, str) for part in parts) and not {int, float} & set(parts)


def _unquoted(word: str) -> str:
    """`word`, or what it says where all of it is one quoted scalar."""
    if word[:1] not in ("'", '"'):
        return word
    try:
        node = yaml.compose(word, Loader=_Loader)
    except yaml.YAMLError:
        return word
    return node.value if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(word) else word


def _refuse_comment(text: str) -> None:
    ends = _guarded(lambda loader: [token.end_mark.index for token in _tokens(loader)], text)
    if text[max(ends, default=0) :].strip():
        raise ValueError("it ends in a comment, and a word of the command line is a value only; leave the comment out")


def _tokens(loader: "_Loader") -> Iterator[Any]:
    while loader.check_token():
        token = loader.get_token()
        if not isinstance(token, yaml.StreamEndToken | yaml.BlockEndToken):
            yield token


def _guarded(work: Any, text: str) -> Any:
    """Whatever YAML finds wrong as one line, without a copy of the text, in which there may be secrets."""
    try:
        loader = _Loader(text)
        return work(loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position} is #x{_code(error.character):04x}: {error.reason}") from None
    except RecursionError:
        raise ValueError(
            "it nests deeper than any configuration, which is sections of keys; take the brackets out"
        ) from None


def _code(character: Any) -> int:
    return character if isinstance(character, int) else ord(character)


def _document(loader: "_Loader", annotation: Any) -> Any:
    node = loader.get_single_node()
    if node is None:
        return None
    _settle(node, annotation)
    _refuse_bases(node, annotation)
    return loader.construct_document(node)


def _refuse_bases(root: yaml.Node, model: Any) -> None:
    """A mapping that only others merge has no place of its own in a configuration: every key there means something."""
    if not isinstance(root, yaml.MappingNode):
        return
    strangers = {id(value): key for key, value in root.value if below(model, str(key.value)) is None}
    for _, section in root.value if model is not None else ():
        for key, value in section.value if isinstance(section, yaml.MappingNode) else ():
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for base in merged if key.tag == _TAG + "merge" else ():
                if stranger := strangers.get(id(base)):
                    _Loader.fail(
                        f"{stranger.value!r} is no section, and only there for others to merge; name its mapping where "
                        f"it is used first, as in run: &base {{steps: 20}}, and merge that one",
                        stranger,
                    )


def _settle(node: yaml.Node, annotation: Any) -> None:
    """Give what `annotation` wants as text the tag of a text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _settle(merged, annotation)
            elif isinstance(key, yaml.ScalarNode):
                key.tag = _TAG + "str"
                _settle(value, below(annotation, key.value))
    elif isinstance(node, yaml.ScalarNode) and _is_text(annotation):
        is_null = node.tag == _TAG + "null" and (node.value != "" or NoneType in alternatives(annotation))
        if not is_null:
            node.tag = _TAG + "str"


class _Loader(yaml.SafeLoader):
    """Resolves and constructs the types of a configuration and no others."""

    yaml_implicit_resolvers: ClassVar = {}  # type: ignore[misc]
    yaml_constructors: ClassVar = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                what = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                self.fail(f"a key is a {what}, and keys are names; write name: value", key)
            if key.value in seen:
                self.fail(f"the key {key.value!r} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    @staticmethod
    def fail(problem: str, node: yaml.Node) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _int(_: _Loader, node: yaml.ScalarNode) -> int | str:
    text = node.value.replace("_", "")
    if len(text) > _MOST_DIGITS:
        return node.value
    try:
        return int(text, 10 if text.lstrip("+-").isdigit() else 0)
    except ValueError:  # of an explicit !!int
        return node.value


def _float(_: _Loader, node: yaml.ScalarNode) -> float | str:
    try:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", node.value.replace("_", ""), flags=re.IGNORECASE))
    except ValueError:
        return node.value


def _bool(_: _Loader, node: yaml.ScalarNode) -> bool | str:
    return _BOOLS.get(node.value.lower(), str(node.value))


def _unknown(loader: _Loader, node: yaml.Node) -> None:
    loader.fail(f"the tag {node.tag} has no meaning in a configuration; leave it out", node)


_BOOLS = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
_DIGITS = "0123456789"
_RESOLVED = {
    "bool": (r"(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"),
    "int": (r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$", "-+" + _DIGITS),
    "float": (
        r"[-+]?(([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF|nan|NaN|NAN))$",
        "-+." + _DIGITS,
    ),
    "null": (r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "merge": (r"<<$", "<"),
}
_CONSTRUCTED = {
    "bool": _bool,
    "int": _int,
    "float": _float,
    "null": yaml.SafeLoader.construct_yaml_null,
    "str": yaml.SafeLoader.construct_yaml_str,
    "seq": yaml.SafeLoader.construct_yaml_seq,
    "map": yaml.SafeLoader.construct_yaml_map,
}
for _name, (_pattern, _first) in _RESOLVED.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))
for _name, _constructor in _CONSTRUCTED.items():
    _Loader.add_constructor(_TAG + _name, _constructor)
_Loader.add_constructor(None, _unknown)
