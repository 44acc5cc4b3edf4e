"""The section about drawn tasks: how often they are answered, by step, by length and by depth."""

from typing import Any

from nsa_launch.report import charts
from nsa_launch.report.facts import Facts
from nsa_launch.report.tables import table


def tasks(facts: Facts) -> str:
    """Empty for a run without tasks."""
    records = facts.records.get("tasks", [])
    if not records:
        return ""
    last = records[-1]
    series: dict[str, list[tuple[float, float]]] = {name: [] for name in last["tasks"]}
    for record in records:
        for name, task in record["tasks"].items():
            series.setdefault(name, []).append((record["step"], task["accuracy"]))
    rows = [
        (name, f"{task['accuracy']:.1%}", str(task["answers"]), *_by_length(task))
        for name, task in last["tasks"].items()
    ]
    lengths = [f"{length} bytes" for length in next(iter(last["tasks"].values()))["by_length"]]
    maps = [_map(name, task, last["step"]) for name, task in last["tasks"].items()]
    return (
        charts.lines(series, "share of the answers that are right", dots=list(series), top=1)
        + table(rows, head=("task", f"right, step {last['step']}", "answers", *lengths))
        + "".join(maps)
    )


def _by_length(task: dict[str, Any]) -> list[str]:
    return [f"{one['accuracy']:.1%}" for one in task["by_length"].values()]


def _map(name: str, task: dict[str, Any], step: int) -> str:
    """A row for each length, a column for each fifth of the text in which the evidence stood; white: nothing there."""
    by_length = task["by_length"]
    rows = [[float("nan") if x is None else x for x in one["by_depth"]] for one in by_length.values()]
    return charts.heat_map(
        rows, f"{name}: right answers, step {step}", "bytes", "fifth of the text, from its beginning", list(by_length)
    )
