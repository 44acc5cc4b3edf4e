"""The table of the READMEs: a column for each case, forward / backward in ms."""

from collections.abc import Iterable

Rows = dict[str, dict]  # the rows of a case by step

# What a line of the table adds up, forward and backward.
LINES = {
    "compress, k and v": ["compress k", "compress v"],
    "cmp": ["cmp"],
    "select": ["select"],
    "slc": ["slc"],
    "win": ["win"],
    "combine / deltas and sum of dq": ["combine", "gate_deltas", "sum_branches"],
    "**all**": ["all"],
    "all, captured in CUDA graphs": ["all, captured"],
    "dense, cuDNN": ["dense"],
}


def markdown(cases: Iterable[tuple[str, Rows]]) -> str:
    """cases: (title, its rows). A step without a time leaves its cell empty."""
    titles, columns = zip(*cases, strict=True)
    lines = [["forward / backward, ms", *titles], ["---"] * (1 + len(titles))]
    lines += [[name, *(_times(rows, steps, name) for rows in columns)] for name, steps in LINES.items()]
    lines.append(["dense / all", *(_ratios(rows) for rows in columns)])
    lines.append(["all, over, GiB", *(_number(rows.get("all", {}).get("peak_gib")) for rows in columns)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _times(rows: Rows, steps: list[str], name: str) -> str:
    sums = []
    for key in ("forward_ms", "backward_ms"):
        values = [rows[step][key] for step in steps if key in rows.get(step, {})]
        sums.append(_number(sum(values)) if values else "")
    text = " / ".join(sums) if sums[1] else sums[0]
    return f"**{text}**" if text and name.startswith("**") else text


def _ratios(rows: Rows) -> str:
    nsa, dense = rows.get("all", {}), rows.get("dense", {})
    if "forward_ms" not in nsa or "forward_ms" not in dense:
        return ""
    return " / ".join(f"{dense[key] / nsa[key]:.1f}x" for key in ("forward_ms", "backward_ms"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
