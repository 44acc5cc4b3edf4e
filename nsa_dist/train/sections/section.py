"""What every section of a configuration checks of its keys."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from nsa_dist.train.files import places

_MOST = 2**31 - 1  # of a whole number: what sizes and counts are kept in by torch and Megatron-core
_MOST_WIDE = 2**63 - 1  # of a seed, and of bytes
_PATIENCE = ("timeout_s", "grace_s")  # ends of names of what is waited for
_SHORTEST_S, _LONGEST_S = 1e-3, 1e9  # of them: what a process keeps a timeout in takes no others


class Section(BaseModel):
    """A frozen part of a configuration that refuses unknown keys, numbers without bounds and texts without letters."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """To pydantic true is 1."""
        kinds = _members(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):
            raise ValueError(f"a number is needed, and this is {str(value).lower()}; give a number")
        return value

    @field_validator("*")
    @classmethod
    def _check_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if isinstance(value, int) and not isinstance(value, bool):
            most = _MOST_WIDE if name == "seed" or name.endswith("_bytes") else _MOST
            if abs(value) > most:
                raise ValueError(f"a whole number of {value.bit_length()} bits is too large; take {most} at most")
        elif isinstance(value, float) and name.endswith(_PATIENCE) and not _SHORTEST_S <= value <= _LONGEST_S:
            raise ValueError(f"{value:g} seconds are no time to wait; take {_SHORTEST_S:g} to {_LONGEST_S:g}")
        elif isinstance(value, str) and not (value.strip() and value.isprintable()):
            raise ValueError(f"{value[:80]!r} is empty or cannot be printed, so it names nothing; give a name")
        return value


def named(place: Any) -> Any:
    """`place`; ValueError for a path that names nothing."""
    if isinstance(place, str | Path):
        places.check_name(place)
    return place


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)
