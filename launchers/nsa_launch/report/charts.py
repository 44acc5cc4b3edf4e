"""The charts of a report, each as an <img> with its picture inside."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_MOST_POINTS = 2000  # of a line: more than a chart has pixels
_MOST_LINES = 12  # of a chart
_DPI = 110
_MOST_WRITTEN = 256  # values written into a heat map

Series = Mapping[str, Sequence[tuple[float, float]]]  # by name, (step, value)


def lines(
    series: Series,
    label: str,
    marks: Sequence[int] = (),
    dots: Sequence[str] = (),
    log: bool = False,
    top: float | None = None,
) -> str:
    """Values by step. `marks` are steps at which the run was started again, `dots` names drawn with points,
    `top` the end of an axis that begins at 0.

    Without a value nothing is drawn. Of more lines than can be told apart the first are drawn, and how many are not
    is said.
    """
    drawn = {name: thinned(points) for name, points in list(series.items())[:_MOST_LINES] if points}
    if not drawn:
        return ""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, points in drawn.items():
        style = "o-" if name in dots or len(points) == 1 else "-"
        axes.plot([x for x, _ in points], [y for _, y in points], style, lw=1.1, ms=4, label=name)
    for mark in marks:
        axes.axvline(mark, color="gray", ls=":", lw=0.8)
    if log and all(y > 0 for points in drawn.values() for _, y in points):
        axes.set_yscale("log")
    if top is not None:
        axes.set_ylim(0, top * 1.05 or 1)
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(drawn) > 1 or next(iter(drawn)) != label:
        axes.legend(fontsize=8)
    left = len(series) - len(drawn)
    note = f"<p class=note>{left} more of these are in metrics.jsonl.</p>" if left > 0 else ""
    return image(_png(figure), f"{label} by step: {', '.join(drawn)}") + note


def heat_map(
    rows: Sequence[Sequence[float]], label: str, down: str, across: str, names: Sequence[str] | None = None
) -> str:
    """A colour for every number of a table in [0, 1], with its value in it where there is room; none for NaN.

    `names` are those of the rows; None: their numbers from 1.
    """
    if not rows or not rows[0]:
        return ""
    height = min(8.0, 1.2 + 0.32 * len(rows))
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    if len(rows) * len(rows[0]) <= _MOST_WRITTEN:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if math.isnan(value):
                    continue
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=_ink(value))
    axes.set(xlabel=across, ylabel=down)
    axes.set_title(label, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(len(rows)), names or [str(i + 1) for i in range(len(rows))])
    figure.colorbar(shown, ax=axes)
    return image(_png(figure), f"{label} by {down} and {across}")


def picture(path: Path, text: str) -> str:
    """A PNG of the run's as it is; nothing where there is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    return image(content, text) if content.startswith(b"\x89PNG") else ""


def image(png: bytes, text: str) -> str:
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def series_of(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """The values of each name that a record has, by step."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for record in records:
        for name in names:
            value = record.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[name].append((record["step"], float(value)))
    return {name: points for name, points in found.items() if points}


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every k-th of them and the last, so that they are no more than a chart can show."""
    every = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:every], points[-1]]


def _ink(value: float) -> str:
    """What can be read on the colour of `value`."""
    return "white" if value < 0.6 else "black"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()
