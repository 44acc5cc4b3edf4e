"""`nsa-dist config`: a configuration in full, as YAML with every key's meaning, and the listing of the keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nsa_dist.train.config_errors import parse
from nsa_dist.train.refused import Refused
from nsa_launch import overrides
from nsa_launch.commands.keys import Key, SectionKeys, sections
from nsa_launch.config import RunConfig, checked

_HEAD = "# One run: nsa-dist train THIS_FILE [key=value ...]. A key that is left out has its default.\n"


def as_yaml(words: Sequence[str]) -> str:
    """The configuration of [CONFIG.yaml] [key=value ...], commented. ValueError says what is wrong with it."""
    values = _configuration(words).model_dump(mode="json")
    return _HEAD + "".join(_section(section, values[section.name]) for section in sections(RunConfig))


def listing(words: Sequence[str]) -> str:
    """Section, key, type, default and meaning. ValueError where there are words, which say nothing here."""
    if words:
        raise Refused(
            f"--keys lists every key with its default, whatever a file says, so {' '.join(words)} would be left "
            f"unread; leave it out, or --keys"
        )
    found = list(sections(RunConfig))
    rows = {(s.name, k.name): (k.name, k.type, _default(k), k.meaning) for s in found for k in s.keys}
    widths = [max(map(len, column)) for column in list(zip(*rows.values(), strict=True))[:-1]]
    lines: list[str] = []
    for section in found:
        lines.append(f"\n{section.name}: {section.meaning}" if lines else f"{section.name}: {section.meaning}")
        for key in section.keys:
            *cells, meaning = rows[section.name, key.name]
            padded = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append("  " + "  ".join([*padded, meaning]))
    return "\n".join(lines) + "\n"


def _configuration(words: Sequence[str]) -> RunConfig:
    if words and "=" not in words[0]:
        return checked(Path(words[0]), words[1:])
    needed = {s.name: {k.name: k.default for k in s.keys if k.needed} for s in sections(RunConfig)}
    raw = {name: keys for name, keys in needed.items() if keys}
    return parse(RunConfig, overrides.apply(raw, words, RunConfig), "what was given")


def _section(section: SectionKeys, values: dict[str, Any]) -> str:
    """Comments in a column of their own, but after what is too long for it."""
    pairs = [(f"  {key.name}: {_scalar(values[key.name])}", key) for key in section.keys]
    width = max(len(text) for text, _ in pairs if len(text) <= 44)
    lines = [f"{text:{width}}  # {'needed: ' if key.needed else ''}{key.meaning}" for text, key in pairs]
    return f"\n{section.name}: # {section.meaning}\n" + "\n".join(lines) + "\n"


def _default(key: Key) -> str:
    return "needed" if key.needed else _scalar(key.default)


def _scalar(value: Any) -> str:
    """As YAML on one line."""
    text = yaml.dump(value, Dumper=_OneLine, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")


class _OneLine(yaml.SafeDumper):
    """Texts of several lines in quotes, where a line's end is written as \\n."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_OneLine.add_representer(str, _text)
