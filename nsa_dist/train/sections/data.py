"""Where the samples of a run come from."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from nsa_dist.train.sections.section import Section, named

LEAST_TASK_LENGTH = 128  # bytes: in fewer some task of `nsa_dist.train.tasks` has no room for a question


class DataSection(Section):
    """Text files read as bytes, or token sets; neither given: the running interpreter's own standard library."""

    folder: Path | None = Field(
        default=None, description="of the texts, subfolders too but no run's; null: the standard library of this Python"
    )
    pattern: str = Field(default="*", description="of the file names below folder; the standard library has its own")
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="share of the files that is for evaluation; of documents in data.tokens"
    )
    max_file_bytes: int = Field(
        default=1_000_000, ge=1, description="bytes; longer files are left out: they are tables"
    )
    tokens: Path | list[tuple[float, Path]] | None = Field(
        default=None,
        description="instead of folder: PREFIX of a token set of `nsa-dist data build`, or [[weight, PREFIX], ...], "
        "blended by samples in the order of their weights",
    )
    documents: Literal["packed", "whole"] = Field(
        default="packed",
        description="packed: those in one sample do not see each other, and positions start over; whole: a sample is "
        "one context, whatever documents it holds",
    )

    tasks: dict[Literal["passkey", "needle", "tracking", "copy", "recall"], float] = Field(
        default_factory=dict,
        description="shares of the training samples that are drawn tasks, such as {recall: 0.25}; the rest is text",
    )
    task_lengths: list[int] | None = Field(
        default=None,
        description="bytes of a task's text: drawn among these in training, each evaluated; null: sequence_length, its "
        "half, quarter and eighth",
    )

    @field_validator("folder", mode="before")
    @classmethod
    def _check_folder(cls, folder: Any) -> Any:
        return named(folder)

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        parts = pattern.split("/")
        if pattern.startswith("/") or ".." in parts or any("**" in part and part != "**" for part in parts):
            raise ValueError(
                f"{pattern!r} cannot be matched against names below data.folder: it begins with /, goes up with .., or "
                f"has ** beside other characters; name the folder in data.folder, and here a pattern such as *.txt"
            )
        return pattern

    @field_validator("tokens", mode="before")
    @classmethod
    def _check_tokens(cls, tokens: Any) -> Any:
        if not isinstance(tokens, list | tuple):
            return named(tokens)
        for pair in tokens or [None]:
            _check_pair(pair)
        prefixes = [str(prefix) for _, prefix in tokens]
        if len(set(prefixes)) < len(prefixes):
            raise ValueError("a PREFIX is given twice, and both would give the same samples; add up their weights")
        return tokens

    @field_validator("tasks", mode="before")
    @classmethod
    def _check_no_switch(cls, tasks: Any) -> Any:
        switches = [name for name, share in tasks.items() if isinstance(share, bool)] if isinstance(tasks, dict) else []
        if switches:
            raise ValueError(f"the share of {switches[0]} is a number, and true or false is none; give one, as 0.25")
        return tasks

    @field_validator("tasks")
    @classmethod
    def _check_shares(cls, tasks: dict[str, float]) -> dict[str, float]:
        for name, share in tasks.items():
            if not 1e-6 <= share <= 1:
                raise ValueError(f"the share {share:g} of {name} is none; give 1e-6 to 1, or leave {name} out")
        total = sum(Fraction(str(share)) for share in tasks.values())
        if total > 1:
            raise ValueError(
                f"the shares of the tasks sum to {float(total):g}, but are of all training samples, what they leave is "
                f"text; give shares that sum to 1 or less"
            )
        return tasks

    @model_validator(mode="after")
    def _check_tasks(self) -> "DataSection":
        if self.tasks and self.tokens is not None:
            raise ValueError(
                "tasks and tokens are both given, but tasks are written in bytes, and tokens are of a vocabulary of "
                "their own; leave tokens out and give data.folder, or leave tasks out"
            )
        if self.task_lengths is not None and not self.tasks:
            raise ValueError("task_lengths is given and no task; give tasks, such as {recall: 0.25}, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_one_source(self) -> "DataSection":
        if self.tokens is None:
            return self
        given = [
            name for name in ("folder", "pattern", "max_file_bytes") if getattr(self, name) != _default(self, name)
        ]
        if given:
            raise ValueError(
                f"tokens and {', '.join(given)} are both given, and a token set was made of its files long before; "
                f"leave tokens out, or {', '.join(given)}"
            )
        return self

    @property
    def token_sets(self) -> tuple[tuple[float, Path], ...]:
        """(weight, prefix) of each; none where the texts are read as bytes."""
        if self.tokens is None:
            return ()
        return tuple(self.tokens) if isinstance(self.tokens, list) else ((1.0, self.tokens),)

    @property
    def is_packed(self) -> bool:
        return self.documents == "packed"

    @property
    def loss_unit(self) -> str:
        """Of every loss of the run."""
        return "nats per token" if self.token_sets else "nats per byte"

    @property
    def places(self) -> dict[str, Path]:
        """{what names it: path} of all that is read from elsewhere."""
        folder = {} if self.folder is None else {"data.folder": self.folder}
        return folder | {f"data.tokens {prefix}": prefix for _, prefix in self.token_sets}

    def moved(self, place: Callable[[str, Path], Path]) -> "DataSection":
        """A copy with `place(key, path)` for every path."""
        folder = None if self.folder is None else place("data.folder", self.folder)
        tokens = [(weight, place("data.tokens", prefix)) for weight, prefix in self.token_sets]
        one = tokens[0][1] if isinstance(self.tokens, Path) else tokens or None
        return self.model_copy(update={"folder": folder, "tokens": one})


def _check_pair(pair: Any) -> None:
    """ValueError unless it is a weight and a place."""
    weight, prefix = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not isinstance(prefix, str | Path):
        raise ValueError(
            "a blend is a list of pairs of a number and a text; write it as [[0.7, tokens/web], [0.3, tokens/code]]"
        )
    if not 1e-9 <= weight <= 1e9:
        raise ValueError(f"the weight {weight!r} of {prefix} is no share of the samples; give 1e-9 to 1e9")
    named(prefix)


def _default(section: BaseModel, name: str) -> Any:
    return type(section).model_fields[name].default
