"""Pictures of `results.jsonl`: losses by tokens with the spread over seeds, and answers by length and depth.

    python examples/evidence/pictures.py runs/copy-cpu/results.jsonl --out runs/copy-cpu

Draws `losses.png` and `positions.png`, losses by place in a document; where there are tasks also `answers.png`, by
step, and for each of them `TASK.png`, heat maps of length and depth side by side. Where the lines are of several
experiments, as stages are, each has a folder of its own.
Runs that failed are left out and named.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"dense": "#30638e", "nsa": "#d1495b"}
OTHERS = ("#6a994e", "#8f5ea2", "#e09f3e")
Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by attention


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="results.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args(argv)
    lines = [json.loads(line) for path in arguments.results for line in path.read_text().splitlines()]
    for line in lines:
        if line["exit_code"]:
            print(f"left out: {line['attention']} seed {line['seed']} ended with exit code {line['exit_code']}")
    ended: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))  # by experiment, by attention
    for line in lines:
        if line["exit_code"] == 0:
            ended[line["experiment"]][line["attention"]].append(line)
    if not ended:
        print("no run came to its end: there is nothing to draw", file=sys.stderr)
        return 1
    for experiment, results in ended.items():
        draw(results, arguments.out / experiment if len(ended) > 1 else arguments.out)
    return 0


def draw(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"losses": losses(results), **positions(results), **answers(results)}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
    print(f"drew {', '.join(f'{name}.png' for name in figures)} in {folder}")


def losses(results: Results) -> Figure:
    """Validation loss of text by training tokens: the mean over seeds, and from the least to the largest."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (attention, runs) in enumerate(results.items()):
        by_step = by_step_of([dict(run["validation"]) for run in runs])
        of_step = tokens_a_step(runs[0])
        spread(axes, {step * of_step: values for step, values in by_step.items()}, attention, len(runs), index)
    axes.set(xlabel="training tokens", ylabel="validation loss of text (nats per byte)")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def positions(results: Results) -> dict[str, Figure]:
    """ "positions": losses of the last evaluation by place in the document; none of lines without."""
    last = {attention: [run.get("by_position", [{}])[-1] for run in runs] for attention, runs in results.items()}
    curves = {
        name: [{int(place): loss for place, loss in one.items() if place != "step"} for one in many]
        for name, many in last.items()
    }
    if not all(curve for many in curves.values() for curve in many):
        return {}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (attention, many) in enumerate(curves.items()):
        spread(axes, by_step_of(many), attention, len(many), index)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes of the document before, up to", ylabel="validation loss of text (nats per byte)")
    axes.legend()
    axes.grid(alpha=0.3)
    return {"positions": figure}


def answers(results: Results) -> dict[str, Figure]:
    """By name of the picture: "answers" over steps, and a heat map for each task."""
    tasks = list(dict.fromkeys(name for runs in results.values() for run in runs for name in names_of(run)))
    if not tasks:
        return {}
    figure = Figure(figsize=(4.5 * len(tasks), 3.8), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for index, (attention, runs) in enumerate(results.items()):
            curves = [{each["step"]: each[task]["accuracy"] for each in run["tasks"]} for run in runs]
            spread(axes, by_step_of(curves), attention, len(runs), index)
        axes.set(title=task, xlabel="step", ylabel="right answers", ylim=(0, 1.03))
        axes.legend()
        axes.grid(alpha=0.3)
    return {"answers": figure, **{task: heat_maps(results, task) for task in tasks}}


def heat_maps(results: Results, task: str) -> Figure:
    """Length down, depth across, a map for each attention, four in a row: the mean over seeds, last evaluation."""
    columns = min(len(results), 4)
    down = -(-len(results) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * down), layout="constrained")
    places = figure.subplots(down, columns, squeeze=False).flatten()
    for empty in places[len(results) :]:
        empty.set_axis_off()
    for axes, (attention, runs) in zip(places, results.items(), strict=False):
        lengths = [run["tasks"][-1][task]["by_length"] for run in runs]
        rows = [
            [averaged([one[length]["by_depth"][depth] for one in lengths]) for depth in range(len(first["by_depth"]))]
            for length, first in lengths[0].items()
        ]
        shown = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if value == value:  # not NaN: there was evidence
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axes.set(title=f"{task}, {attention}, {len(runs)} seed{'s' * (len(runs) > 1)}", xlabel="fifth of the text")
        axes.set_xticks(range(len(rows[0])), [str(part + 1) for part in range(len(rows[0]))])
        axes.set_yticks(range(len(rows)), [f"{length} bytes" for length in lengths[0]])
        figure.colorbar(shown, ax=axes)
    return figure


def spread(axes: Any, by_x: Mapping[float, Sequence[float]], name: str, seeds: int, index: int) -> None:
    colour = COLOURS.get(name, OTHERS[index % len(OTHERS)])
    xs = sorted(by_x)
    axes.plot(
        xs, [mean(by_x[x]) for x in xs], "o-", ms=3, color=colour, label=f"{name}, {seeds} seed{'s' * (seeds > 1)}"
    )
    if seeds > 1:
        axes.fill_between(xs, [min(by_x[x]) for x in xs], [max(by_x[x]) for x in xs], color=colour, alpha=0.2)


def by_step_of(curves: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """{step: the values of all curves} at the steps that all of them have."""
    steps = set(curves[0]).intersection(*curves)
    return {step: [curve[step] for curve in curves] for step in sorted(steps)}


def tokens_a_step(run: Mapping[str, Any]) -> float:
    step, tokens, _ = run["train"][-1]
    return tokens / step


def names_of(run: Mapping[str, Any]) -> list[str]:
    return [name for name in (run["tasks"][-1] if run["tasks"] else {}) if name != "step"]


def averaged(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return mean(there) if there else float("nan")


if __name__ == "__main__":
    sys.exit(main())
