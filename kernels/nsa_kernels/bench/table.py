"""The table of the READMEs: a column for each case, forward / backward in ms."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Rows = Mapping[str, dict[str, Any]]  # the rows of a case by step

# What a line of the table adds up, forward and backward.
LINES = {
    "compress, k and v": ["compress k", "compress v"],
    "cmp": ["cmp"],
    "select": ["select"],
    "slc": ["slc"],
    "win": ["win"],
    "combine / deltas and sum of dq": ["combine", "gate_deltas", "sum_branches"],
    "all": ["all"],
    "all, captured in CUDA graphs": ["all, captured"],
    "dense, cuDNN": ["dense"],
}


@dataclass(frozen=True)
class Figure:
    """A time, and how far off its repeats say that it may be."""

    ms: float
    spread_ms: float


def figures(rows: Rows) -> dict[tuple[str, str], Figure]:
    """(line of the table, "forward" or "backward") -> its sum. A line of which a step was not timed has none."""
    found = {}
    for name, steps in LINES.items():
        parts = [rows.get(step, {}) for step in steps]
        if not all("forward_ms" in part or "backward_ms" in part for part in parts):
            continue
        for direction in ("forward", "backward"):
            timed = [part for part in parts if f"{direction}_ms" in part]
            if timed:
                spread_ms = sum(part.get(f"{direction}_spread_ms", 0.0) for part in timed)
                found[name, direction] = Figure(sum(part[f"{direction}_ms"] for part in timed), spread_ms)
    return found


def markdown(cases: Iterable[tuple[str, Rows]]) -> str:
    """cases: (title, its rows). A line without a time leaves its cell empty."""
    titles, columns = zip(*cases, strict=True)
    summed = [figures(rows) for rows in columns]
    lines = [["forward / backward, ms", *titles], ["---"] * (1 + len(titles))]
    lines += [[_bold(name), *(_bold(_times(sums, name), name) for sums in summed)] for name in LINES]
    lines.append(["dense / all", *(_ratios(rows) for rows in columns)])
    lines.append(["all, over, GiB", *(_number(rows.get("all", {}).get("peak_gib")) for rows in columns)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _bold(text: str, name: str | None = None) -> str:
    """The text, in bold in the line that counts."""
    return f"**{text}**" if text and (name or text) == "all" else text


def _times(sums: Mapping[tuple[str, str], Figure], name: str) -> str:
    known = (sums.get((name, direction)) for direction in ("forward", "backward"))
    texts = [_number(figure.ms if figure else None) for figure in known]
    return " / ".join(texts) if texts[1] else texts[0]


def _ratios(rows: Rows) -> str:
    nsa, dense = rows.get("all", {}), rows.get("dense", {})
    if "forward_ms" not in nsa or "forward_ms" not in dense:
        return ""
    return " / ".join(f"{dense[key] / nsa[key]:.1f}x" for key in ("forward_ms", "backward_ms"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
