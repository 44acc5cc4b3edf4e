"""The sections about the attention: what context parallelism sent, and what queries chose."""

from collections.abc import Mapping
from typing import Any

from nsa_launch.report import charts
from nsa_launch.report.facts import Facts
from nsa_launch.report.tables import mapping, number, table

_MB = 1e6


def traffic(facts: Facts) -> str:
    """What the context-parallel ranks sent: by step, by kind beside the formulas, and how much of it was chosen."""
    records = facts.records.get("traffic", [])
    if not records:
        return "<p>One context-parallel rank: nothing is sent in the attention.</p>"
    last = records[-1]
    sent, formula = (mapping(last.get(name)) for name in ("sent_bytes", "formula_bytes"))
    rows = [(kind, f"{count / _MB:,.3f}", f"{formula.get(kind, 0) / _MB:,.3f}") for kind, count in sent.items()]
    rows.append(("all", f"{sum(sent.values()) / _MB:,.3f}", f"{sum(formula.values()) / _MB:,.3f}"))
    total = [(r["step"], sum(mapping(r.get("sent_bytes")).values()) / _MB) for r in records]
    fractions = charts.series_of(records, ["union_fraction"])
    chosen = {"fraction of the remote blocks chosen": fractions.get("union_fraction", [])}
    parts = [
        charts.lines({"sent": total}, "MB sent in a step, all ranks", top=max(sent_mb for _, sent_mb in total)),
        charts.lines(chosen, "union fraction", top=1),
        _union_map(last),
        f"<h3>Step {last['step']}, MB by kind</h3>",
        table(rows, head=("kind", "sent", "closed formula")),
        f"<p>Load imbalance: {number(last.get('load_imbalance'))} (keys attended by the busiest rank over the mean)."
        "</p>",
    ]
    return "".join(parts)


def _union_map(record: Mapping[str, Any]) -> str:
    layers = record.get("layers")
    values = [layer.get("union_fraction") for layer in layers.values()] if isinstance(layers, dict) else []
    rows = [[float(u) for u in row] for row in values if isinstance(row, list) and row]
    if not rows or len({len(row) for row in rows}) > 1:
        return ""
    return charts.heat_map(rows, f"union fraction, step {record['step']}", "layer", "key/value head")


def selection(facts: Facts) -> str:
    """The map that a run draws at its end."""
    if facts.attention == "dense":
        return "<p>The run's attention is dense: every token sees all before it, and none selects blocks.</p>"
    shown = charts.picture(facts.folder.path / "selection.png", "the selection blocks that each query chose")
    return shown or "<p>The map of the selected blocks is drawn when a run has made its last step.</p>"
