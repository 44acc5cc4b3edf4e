"""Is it slower than it was? The figures of a run beside those of a stored bench.json, line by line of the table.

    slower   now_ms > 1.05 * stored_ms + spread_ms
    faster   now_ms < 0.95 * stored_ms - spread_ms

spread_ms is that of both measurements together: half the distance of the quartiles of each one's runs, 0 where there
was one run only. Two kinds of lines are shown and never judged: dense attention, which is cuDNN's, so that a card that
is slower today shows in it; and what the host paces, below LEAST_MS, and up to CAPTURED_TOKENS tokens where no graph
replays it. There two runs of the same kernels on one machine lay up to half apart (docs/decisions/kernel-bench.md).

Example: stored 20.0 ms with a spread of 0.1, now 21.2 with 0.2. The limit is 21.0 + 0.3 ms, so it is no slower.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_kernels.bench.cases import CAPTURED_TOKENS
from nsa_kernels.bench.table import LINES, Figure, figures

THRESHOLD = 0.05  # of the stored time
LEAST_MS = 2.0
_NOT_JUDGED = {"dense, cuDNN"}
_CAPTURED = "all, captured in CUDA graphs"
_FAILING = {"slower", "no time now"}
_MACHINE = ("date", "torch", "triton", "copy_TB_per_s", "bf16_TFLOP_per_s")


@dataclass(frozen=True)
class Line:
    """One line of the table in one direction. `word` is the judgement."""

    case: str
    name: str
    direction: str
    stored: Figure | None
    now: Figure | None
    tokens: int

    @property
    def word(self) -> str:
        if self.stored is None:
            return "new"
        if self.now is None:
            return "not run now" if self.name in _NOT_JUDGED else "no time now"
        if self.name in _NOT_JUDGED or self._paced_by_the_host(self.stored):
            return "not judged"
        spread = self.stored.spread_ms + self.now.spread_ms
        if self.now.ms > (1 + THRESHOLD) * self.stored.ms + spread:
            return "slower"
        return "faster" if self.now.ms < (1 - THRESHOLD) * self.stored.ms - spread else "as before"

    def _paced_by_the_host(self, stored: Figure) -> bool:
        return self.name != _CAPTURED and (stored.ms < LEAST_MS or self.tokens <= CAPTURED_TOKENS)

    def text(self) -> str:
        before, now = (f"{f.ms:10.2f}" if f else f"{'':10}" for f in (self.stored, self.now))
        ratio = f"{self.now.ms / self.stored.ms:8.2f}x" if self.stored and self.now else f"{'':9}"
        return f"  {self.name:32}{self.direction:10}{before}{now}{ratio}  {self.word}"


@dataclass(frozen=True)
class Comparison:
    """All lines, and the stored cases that this run left out."""

    head: str
    lines: tuple[Line, ...]
    left_out: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Something is slower, or has no time though its case was run."""
        return any(line.word in _FAILING for line in self.lines)

    def text(self) -> str:
        """The table, then what it comes to."""
        parts = [self.head]
        for case in dict.fromkeys(line.case for line in self.lines):
            parts.append(f"\n{case:34}{'':10}{'stored ms':>10}{'now ms':>10}{'ratio':>9}")
            parts += [line.text() for line in self.lines if line.case == case]
        parts += ["", *(f"not run now, though stored: {name}" for name in self.left_out)]
        for word in ("new", "faster", "no time now", "slower"):
            parts += [f"{word}: {line.case}, {line.name}, {line.direction}" for line in self.lines if line.word == word]
        if not self.failed:
            parts.append(f"nothing is slower by more than {THRESHOLD:.0%} and the spread of the runs")
        return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class Stored:
    """An earlier bench.json."""

    path: Path
    machine: Mapping[str, Any]
    cases: Mapping[str, Mapping[str, dict[str, Any]]]  # name -> the rows by step

    @classmethod
    def read(cls, path: Path) -> "Stored":
        """ValueError if `path` is not what the benchmark writes."""
        try:
            bench = json.loads(path.read_text(encoding="utf-8"))
            machine, cases = dict(bench["machine"]), {case["case"]: _by_step(case) for case in bench["cases"]}
            machine["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a bench.json ({type(error).__name__}: {error}), so there is nothing to compare with; "
                f"pass the bench.json that an earlier run wrote into its --out, or leave --compare out"
            ) from None
        return cls(path, machine, cases)

    def check(self, device: str, names: Sequence[str]) -> None:
        """ValueError where a run of the cases `names` on `device` could not be held to these figures."""
        if device != self.machine["device"]:
            raise ValueError(
                f"{self.path} was measured on {self.machine['device']} and this is {device}: times of two kinds of "
                f"card say nothing about the kernels; pass a bench.json of {device}, or leave --compare out and keep "
                f"the one that this run writes"
            )
        if not set(names) & set(self.cases):
            raise ValueError(
                f"{self.path} has none of the cases of this run ({', '.join(names)}), so nothing would be compared; "
                f"choose with --preset and --only among those that it has: {', '.join(self.cases)}"
            )

    def compare(self, machine: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> Comparison:
        """With the machine and the cases of a run as its bench.json holds them."""
        lines = [line for case in cases for line in _lines(case, self.cases.get(case["case"], {}))]
        now = {case["case"] for case in cases}
        left_out = tuple(name for name in self.cases if name not in now)
        head = f"stored: {self.path}, {_described(self.machine)}\nnow: {_described(machine)}"
        return Comparison(head, tuple(lines), left_out)


def _by_step(case: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["step"]: row for row in case["rows"]}


def _lines(case: Mapping[str, Any], stored: Mapping[str, dict[str, Any]]) -> Iterator[Line]:
    before, after = figures(stored), figures(_by_step(case))
    for name in LINES:
        for direction in ("forward", "backward"):
            pair = before.get((name, direction)), after.get((name, direction))
            if pair != (None, None):
                yield Line(case["case"], name, direction, *pair, case["tokens"])


def _described(machine: Mapping[str, Any]) -> str:
    """What may explain a difference."""
    known = [(name, machine[name]) for name in _MACHINE if name in machine]
    words = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in known]
    return ", ".join([str(machine["device"]), *words])
