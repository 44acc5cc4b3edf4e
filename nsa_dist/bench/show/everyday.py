"""Few tokens a rank: lines and a picture of what context parallelism takes there, by transport."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa_dist.bench.few.everyday import INSTANT
from nsa_dist.bench.show.report import Row, ms

_COLOURS = {"one_sided": "#2a9d8f", "all_to_all": "#d1495b", "all-gather": "#30638e", "shared all-gather": "#8cb369"}


def slowest(ranks: list[list[Row]]) -> Iterable[Row]:
    """Every way's row of the slowest rank, and `above_s`, how much more than the slowest rank's instant transport."""
    rows = [max(of_ranks, key=lambda row: row["total_s"]) for of_ranks in zip(*ranks, strict=True)]
    by = {(row["way"], row["how"]): row for row in rows}
    for row in rows:
        instant = by.get((f"{INSTANT}, {row['way']}", row["how"]))
        yield row | ({"above_s": row["total_s"] - instant["total_s"]} if instant else {})


def line(row: Row) -> str:
    above = f"  above instant {ms(row['above_s'])}" if "above_s" in row else ""
    parts = f" = {ms(row['forward_s'])} + {ms(row['backward_s'])}" if "forward_s" in row else ""
    return (
        f"  {row['name']:36} {row['how']:9} {row['way']:38} {ms(row['total_s']):>8}{parts}  "
        f"host {ms(row['host_s'])}{above}"
    )


def draw(data: dict[str, Any], path: Path) -> None:
    """Times by tokens a rank, a panel for each number of heads; beside them how the host's time divides."""
    rows = [row for row in data["everyday"] if "error" not in row]
    heads = sorted({row["heads"] for row in rows}, reverse=True)
    shown = [row for row in rows if row["heads"] == heads[-1] and "divided" in row]
    figure = Figure(figsize=(5.2 * (len(heads) + bool(shown)), 4.8), layout="constrained")
    panels = list(figure.subplots(1, len(heads) + bool(shown), squeeze=False)[0])
    for axes, number in zip(panels, heads, strict=False):
        _draw_times(axes, [row for row in rows if row["heads"] == number])
        axes.set_title(f"{number} query heads", loc="left", weight="bold")
    if shown:
        _draw_divided(panels[-1], shown)
    about = data["machine"]
    figure.suptitle(
        f"One layer, forward and backward, few tokens a rank: {about['device']}, {about['ranks']}", fontsize=11
    )
    figure.savefig(path, dpi=110)


def _draw_times(axes: Axes, rows: list[Row]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        instant = row["way"].startswith(INSTANT)
        name = "instant transport" if instant else _transport(row["way"])
        lines.setdefault(f"{name}, {row['how']}", []).append((row["per_rank"], 1e3 * row["total_s"]))
    for name, points in lines.items():
        transport, how = name.rsplit(", ", 1)
        dashes = "--" if how == "captured" else "-"
        axes.plot(*zip(*sorted(points), strict=True), dashes, marker="o", ms=3.5, label=name,
                  color=_COLOURS.get(transport, "#9a9cb3"))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row["per_rank"] for row in rows})
    axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
    axes.set_xlabel("tokens a rank")
    axes.set_ylabel("ms")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _transport(way: str) -> str:
    return next((name for name in ("one_sided", "all_to_all", "shared all-gather") if name in way), "all-gather")


def _draw_divided(axes: Axes, rows: list[Row]) -> None:
    """Of one length: a bar for the host and one for the device of each way."""
    names, colours = [], ["#d1495b", "#f4a261", "#e9c46a", "#9a9cb3", "#2a9d8f", "#30638e"]
    parts = [*rows[0]["divided"]["host"], *rows[0]["divided"]["device"]]
    for number, row in enumerate(rows):
        for offset, where in enumerate(("host", "device")):
            bottom = 0.0
            for part, seconds in row["divided"][where].items():
                label = part if number == 0 else None
                axes.bar(
                    3 * number + offset, 1e3 * seconds, bottom=bottom, color=colours[parts.index(part)], label=label
                )
                bottom += 1e3 * seconds
            names.append((3 * number + offset, f"{_transport(row['way'])}\n{where}"))
    axes.set_xticks([x for x, _ in names], [name for _, name in names], fontsize=7)
    axes.set_ylabel("ms, under the profiler")
    axes.set_title(f"How {rows[0]['per_rank']:,} tokens a rank divide", loc="left", weight="bold")
    axes.legend(frameon=False, fontsize=8)
