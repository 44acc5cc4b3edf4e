"""The sections of a report, each HTML of its own; an empty one is left out of the page."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

import yaml

from nsa_launch.report import charts
from nsa_launch.report.facts import Facts, numbers
from nsa_launch.report.tables import table

_KNOWN = ("start", "train", "validation", "traffic", "tasks")  # kinds of records with a section of their own
_GIB = 2**30
_ENDS = ("launch", "start", "stop", "end", "gave up", "refused")  # events that end a launch or begin one


def summary(facts: Facts) -> str:
    """How far it came, and the figures that are asked for first."""
    train, validation = facts.records.get("train", []), facts.records.get("validation", [])
    rows = [("state", state(facts)), ("begun", facts.marker.begun), ("run id", facts.marker.run_id)]
    rows.append(("attention", facts.attention if isinstance(facts.attention, str) else ", ".join(facts.attention)))
    if train:
        rows.append(("training loss", f"{train[0]['loss']:.4f} (step {train[0]['step']}) → {_loss(train[-1])}"))
    if validation:
        first, last = validation[0], validation[-1]
        way = f"{first['loss']:.4f} (step {first['step']}) → {_loss(last)}"
        rows.append(("validation loss", f"{way}, {facts.loss_unit}"))
    speeds = [r["tokens_per_s"] for r in train if isinstance(r.get("tokens_per_s"), int | float)]
    if speeds:
        rows.append(("tokens/s", f"{sorted(speeds)[len(speeds) // 2]:,.0f}, the median of {len(speeds)} records"))
    if train and isinstance(train[-1].get("tokens"), int):
        rows.append(("tokens trained on", f"{train[-1]['tokens']:,}"))
    rows.append(("failures survived", str(len(facts.events_of("failure")))))
    for name, number in facts.skipped.items():
        if number:
            rows.append((name, f"{number} lines are no records and were passed over"))
    return table(rows)


def state(facts: Facts) -> str:
    """In words, from the last event that ends a launch or begins one."""
    of = f" of {facts.steps_wanted}" if facts.steps_wanted else ""
    ends = [event for event in facts.events if event.get("event") in _ENDS]
    last = ends[-1].get("event") if ends else None
    if last == "end":
        return f"finished after step {facts.last_step}{of}"
    if last == "stop":
        return f"stopped after step {facts.last_step}{of}; resume=true goes on with it"
    if last == "gave up":
        return f"ended by itself after step {facts.last_step}{of}: see the records of health, and the ranks' logs"
    if last == "refused":
        return f"refused: {ends[-1].get('reason')}"
    if last is None:
        return "prepared, never launched"
    return f"not at its end: it was training, or had been cut off, when this was written; step {facts.last_step}{of}"


def losses(facts: Facts) -> str:
    """Training and validation loss, those of multi-token prediction and by place, gradient norm and learning rate."""
    train, validation = facts.records.get("train", []), facts.records.get("validation", [])
    marks = [record["step"] for record in facts.records.get("start", []) if record["step"] > 0]
    both = {
        "training": charts.series_of(train, ["loss"]).get("loss", []),
        "validation": charts.series_of(validation, ["loss"]).get("loss", []),
        **_by_name(train, "mtp_loss", "mtp_loss/"),
    }
    note = '<p class="note">Dotted lines: the steps at which it was started again.</p>' if marks else ""
    others = [("grad_norm", "gradient norm", True), ("lr", "learning rate", False)]
    return (
        charts.lines({k: v for k, v in both.items() if v}, f"loss ({facts.loss_unit})", marks, dots=["validation"])
        + note
        + charts.lines(_by_name(validation, "by_position", "up to "), "validation loss by place", marks)
        + "".join(charts.lines(_renamed(train, name, label), label, marks, log=log) for name, label, log in others)
    )


def _by_name(records: Sequence[Mapping[str, Any]], key: str, prefix: str) -> dict[str, list[tuple[float, float]]]:
    """Of each number that the records have under `key`, by step; it is called `prefix` and its own name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for path, loss in numbers({key: record.get(key)}).items():
            found.setdefault(prefix + path.removeprefix(f"{key}/"), []).append((record["step"], loss))
    return found


def speed(facts: Facts) -> str:
    train = facts.records.get("train", [])
    return charts.lines(_renamed(train, "tokens_per_s", "tokens per second"), "tokens per second")


def memory(facts: Facts) -> str:
    """Of whatever records say they hold bytes of memory."""
    found: dict[str, list[tuple[float, float]]] = {}
    for records in facts.records.values():
        for record in records:
            for name, value in numbers(record).items():
                if "memory" in name:
                    found.setdefault(name, []).append((record["step"], value / _GIB))
    return charts.lines(found, "GiB")


def health(facts: Facts) -> str:
    """Every other kind of record as charts, a chart for each number that it names first."""
    parts = []
    for kind, records in facts.records.items():
        if kind in _KNOWN:
            continue
        grouped: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for record in records:
            for path, value in numbers(record).items():
                name, _, rest = path.partition("/")
                grouped.setdefault(name, {}).setdefault(rest or name, []).append((record["step"], value))
        drawn = [charts.lines(series, name, dots=list(series)) for name, series in grouped.items()]
        parts.append(f"<h3>{escape(kind)}</h3>{''.join(drawn)}{_words(records)}")
    return "".join(parts)


def _words(records: Sequence[Mapping[str, Any]]) -> str:
    """What such records say in words, the last of them first."""
    said: list[tuple[str, str]] = []
    for record in records:
        words = [f"{name}: {value}" for name, value in record.items() if isinstance(value, str) and name != "kind"]
        if words and (not said or said[-1][1] != ", ".join(words)):  # said once until it changes
            said.append((str(record["step"]), ", ".join(words)))
    rows = said[::-1]
    return table(rows[:50], head=("step", "said")) if rows else ""


def events(facts: Facts) -> str:
    """All of `launches.jsonl`, in order."""
    rows = [(str(e.get("time", ""))[:19].replace("T", " "), str(e.get("event", "")), _detail(e)) for e in facts.events]
    return table(rows, head=("time (UTC)", "event", "")) if rows else "<p>It was not started by a launcher.</p>"


def _detail(event: Mapping[str, Any]) -> str:
    ranks = event.get("ranks")
    if event.get("event") == "failure" and isinstance(ranks, dict):
        hung = event.get("hung")
        held_up = {f"rank {rank}": why for rank, why in hung.items()} if isinstance(hung, dict) else {}
        return "; ".join([*(f"rank {rank}: {why}" for rank, why in ranks.items()), *map(" ".join, held_up.items())])
    rest = {name: value for name, value in event.items() if name not in ("event", "time", "versions")}
    return ", ".join(f"{name} {_plain(value)}" for name, value in rest.items())


def _plain(value: Any) -> str:
    """Without the brackets of what is nested one deep."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def settings(facts: Facts) -> str:
    """The configuration as it was checked, and what was changed on the way."""
    if facts.config is None:
        return "<p>config.yaml is missing or cannot be read.</p>"
    text = yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True)
    changed = [
        (str(record["step"]), key, f"{pair[0]} → {pair[1]}")
        for record in facts.records.get("start", [])
        for key, pair in _pairs(record.get("changed"))
    ]
    shown = f"<h3>Changed when it went on</h3>{table(changed, head=('step', 'key', ''))}" if changed else ""
    return f"<pre>{escape(text)}</pre>{shown}"


def versions(facts: Facts) -> str:
    rows = list(facts.versions.items())
    return table(rows) if rows else "<p>No start of this run wrote its versions down.</p>"


def places(facts: Facts) -> str:
    """Where the files are, as links beside this one, and where the ranks were."""
    folder, root = facts.folder, facts.folder.path
    named = [
        (folder.output.checkpoints, "checkpoints"),
        (folder.output.metrics, "every number above, a record a line"),
        (folder.output.tensorboard, "the same for TensorBoard"),
        (folder.launches, "launches, failures and ends"),
        (folder.logs, "what each rank printed"),
        (folder.topology, "which rank ran where"),
        (root / "config.yaml", "the configuration; itself a CONFIG.yaml"),
        (folder.output.data, "the packed texts"),
        *((path, "a picture") for path in sorted(root.glob("*.png"))),
    ]
    rows = [(_link(path.name), what) for path, what in named if path.exists()]
    steps = sorted(path.name for path in folder.output.checkpoints.glob("step_*"))
    held = f"<p>Checkpoints: {escape(', '.join(steps))}.</p>" if steps else "<p>No checkpoint.</p>"
    ranks = [tuple(str(rank.get(name, "")) for name in _OF_A_RANK) for rank in facts.ranks]
    shown = f"<h3>Ranks of the last start</h3>{table(ranks, head=_OF_A_RANK)}" if ranks else ""
    return f"<p>Everything is in <code>{escape(str(root))}</code>.</p>{table(rows, is_html=True)}{held}{shown}"


def _link(name: str) -> str:
    return f'<a href="{escape(quote(name))}">{escape(name)}</a>'


_OF_A_RANK = ("rank", "host", "pid", "device", "nvlink_domain")


def _renamed(records: Sequence[Mapping[str, Any]], name: str, label: str) -> dict[str, list[tuple[float, float]]]:
    found = charts.series_of(records, [name])
    return {label: found[name]} if found else {}


def _pairs(value: Any) -> Iterator[tuple[str, list[Any]]]:
    for key, pair in value.items() if isinstance(value, dict) else ():
        if isinstance(pair, list) and len(pair) == 2:
            yield str(key), pair


def _loss(record: Mapping[str, Any]) -> str:
    return f"{record['loss']:.4f} (step {record['step']})"
