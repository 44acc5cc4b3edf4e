"""Pictures of a bench: memory as ranks grow, times by mode."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa_dist.bench.show.report import GIB, Row

_COLOURS = {"fetch": "#d1495b", "all-gather": "#30638e", "whole shard": "#8d6a9f", "shared all-gather": "#8cb369"}


def draw_memory(data: dict[str, Any], path: Path) -> None:
    """Peak memory of a rank against the number of ranks, at fixed tokens a rank."""
    rows = [row for row in data["memory"] if "error" not in row]
    sizes = sorted({row["tokens_per_rank"] for row in rows})
    figure = Figure(figsize=(5.5 * len(sizes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, tokens_per_rank in zip(panels, sizes, strict=True):
        _draw_curve(axes, [row for row in rows if row["tokens_per_rank"] == tokens_per_rank], tokens_per_rank)
    about = data["machine"]
    figure.suptitle(f"Peak memory of one rank, forward and backward of one layer, {about['device']}", fontsize=12)
    figure.savefig(path, dpi=110)


def _draw_curve(axes: Axes, rows: list[Row], tokens_per_rank: int) -> None:
    for mode in ("all-gather", "fetch"):
        line = [row for row in rows if row["mode"] == mode or row["cp_size"] == 1]
        gathers = mode == "all-gather"
        label = "three raw K/V pairs gathered" if gathers else next(r["way"] for r in line if r["cp_size"] > 1)
        xs, ys = [row["cp_size"] for row in line], [row["peak_bytes"] / GIB for row in line]
        axes.plot(xs, ys, marker="o", color=_COLOURS[mode], label=label)
        offset = 6 if mode == "all-gather" else -14
        for x, y in zip(xs, ys, strict=True):
            axes.annotate(f"{y:.1f}", (x, y), xytext=(0, offset), textcoords="offset points", ha="center", fontsize=9)
    inputs = rows[0]["inputs_bytes"] / GIB
    axes.axhline(inputs, color="#9a9cb3", ls="--", lw=1)
    axes.annotate("inputs and the gradient of the output", (1, inputs), xytext=(0, 3), textcoords="offset points")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["cp_size"] for row in rows})
    axes.set_xticks(ticks, [f"{p}\n{p * tokens_per_rank // 1024}k" for p in ticks])
    axes.set_xlabel("ranks, and tokens of the whole sequence")
    axes.set_ylabel("GiB")
    axes.set_ylim(0, 1.1 * max(row["peak_bytes"] for row in rows) / GIB)
    axes.set_title(f"{tokens_per_rank:,} tokens a rank", loc="left", weight="bold")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)


def draw_ways(data: dict[str, Any], path: Path) -> None:
    """Forward plus backward of every way and length, the part that was waited for, and what was predicted."""
    rows = [row for row in data["cases"] if "error" not in row]
    panels = sorted({(row["tokens"], row["case"].split()[2]) for row in rows}, reverse=True)
    figure = Figure(figsize=(4.4 * len(panels), 4.8), layout="constrained")
    for axes, (tokens, dims) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        shown = [row for row in rows if row["tokens"] == tokens and row["case"].split()[2] == dims]
        _draw_times(axes, shown)
        axes.set_title(f"{tokens:,} tokens, {dims}", loc="left", weight="bold", fontsize=10)
    about = data["machine"]
    figure.suptitle(f"One layer, forward and backward: {about['ranks']}, {about['device']}", fontsize=12)
    figure.savefig(path, dpi=110)


def _draw_times(axes: Axes, rows: list[Row]) -> None:
    for x, row in enumerate(rows):
        whole = 1e3 * (row["forward_s"] + row["backward_s"])
        waited = min(whole, 1e3 * sum(row["exposed_s"].values()))
        axes.bar(x, whole - waited, color=_COLOURS[row["mode"]], label="computing" if x == 0 else None)
        axes.bar(x, waited, bottom=whole - waited, color="#edae49", label="waiting" if x == 0 else None)
        if "predicted" not in row:
            continue
        told = 1e3 * (row["predicted"]["forward_s"] + row["predicted"]["backward_s"])
        axes.plot([x - 0.4, x + 0.4], [told, told], color="black", lw=1.5, label="predicted" if x == 0 else None)
    axes.set_xticks(range(len(rows)), [row["way"] for row in rows], rotation=30, ha="right")
    axes.set_ylabel("ms of the slowest rank")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
