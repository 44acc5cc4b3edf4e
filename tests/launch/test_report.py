"""`report.html` of run folders that are made up: whole, cut off, and spoiled."""

import base64
import html.parser
import json
import os
import re

import pytest
import yaml

from launch_cases import tiny
from nsa_dist.train.files.marker import RunMarker
from nsa_dist.train.refused import Refused
from nsa_launch import cli, exit_codes
from nsa_launch.console import Console
from nsa_launch.report import charts, page
from nsa_launch.report.charts import thinned
from nsa_launch.run_folder import LAUNCHED, PROCESS_DIED, RunFolder, claimed

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SECRET = "hunter2-hunter2"
VERSIONS = {"nsa-dist": "0.1.0", "torch": "2.99"}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    with claimed(tiny(tmp_path, f"launch.env.HF_TOKEN={SECRET}", "launch.env.NCCL_DEBUG=INFO")) as folder:
        return folder


def train(step: int, **more) -> dict:
    numbers = {
        "loss": 5.0 - step / 10,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 256 * step,
        "tokens_per_s": 3000.0 + step,
    }
    return {"kind": "train", "step": step, **numbers, "memory_bytes": 2**30, **more}


def traffic(step: int) -> dict:
    layers = {str(n): {"union_fraction": [0.25, 0.5], "sent_bytes": {"pages": 4e6}} for n in (1, 2)}
    sent = {"halo": 1_000_000, "pages": 8_000_000}
    return {
        "kind": "traffic", "step": step, "sent_bytes": sent, "formula_bytes": sent, "union_fraction": 0.375,
        "load_imbalance": 1.14, "layers": layers,
    }  # fmt: skip


def write(folder: RunFolder, *records: dict | str) -> None:
    with folder.output.metrics.open("a") as file:
        file.writelines((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


def lived(folder: RunFolder) -> RunFolder:
    """A run that lost a rank and went on to its end."""
    folder.record("launch", id="launch-1", world_size=2)
    folder.record("start", world_size=2, step=0, versions=VERSIONS)
    write(folder, {"kind": "start", "step": 0}, {"kind": "validation", "step": 0, "loss": 5.5})
    for step in range(1, 9):
        write(folder, train(step), traffic(step))
    folder.record("failure", ranks={"0": "Connection closed by peer", "1": PROCESS_DIED})
    folder.record("start", world_size=2, step=5, versions=VERSIONS)
    write(folder, {"kind": "start", "step": 5, "changed": {"optimizer.lr": [0.003, 0.002]}})
    for step in range(6, 25):
        gates = {"cmp": 0.2, "slc": [0.3, 0.4]}
        write(folder, train(step), traffic(step), {"kind": "health", "step": step, "gates": gates, "step_s": 0.1})
    write(
        folder,
        {"kind": "validation", "step": 24, "loss": 2.5},
        {"kind": "health", "step": 24, "note": "rank 1 is slow"},
    )
    folder.record("end", step=24)
    (folder.path / "selection.png").write_bytes(PNG)
    folder.topology.write_text(json.dumps([{"rank": 0, "host": "a-host", "pid": 7, "device": "cpu"}]))
    folder.output.make_checkpoint(24)
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would see: texts by section, the pictures, and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.images: list[tuple[str, bytes]] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self._tags: list[str] = []
        self._title = ""
        self.feed(text)
        self.close()
        assert self._tags == []  # every tag is closed by its own

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "img":
            kind, _, content = found["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.images.append((found["alt"], base64.b64decode(content, validate=True)))
        elif tag not in ("meta",):
            self._tags.append(tag)
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)
        if tag == "a":
            self.links.append(found["href"])

    def handle_endtag(self, tag):
        assert self._tags.pop() == tag

    def handle_data(self, data):
        if self._tags and self._tags[-1] == "h2":
            self._title = data
        elif self._title:
            self.sections[self._title] = f"{self.sections.get(self._title, '')} {data}".strip()


DRAWN = (
    "training, validation", "gradient norm", "learning rate", "tokens per second", "memory_bytes", "MB sent",
    "fraction of the remote blocks", "by layer and key/value head", "selection blocks", "gates", "step_s",
)  # fmt: skip


def read(folder: RunFolder) -> Page:
    path = page.write(folder)
    assert path == folder.path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_whole_run_is_on_one_page_that_needs_nothing_else(folder):
    seen = read(lived(folder))
    assert list(seen.sections) == [
        "Summary", "Losses", "Throughput", "Memory", "Traffic", "Selection", "Health", "Launches and failures",
        "Configuration", "Versions", "Where everything is",
    ]  # fmt: skip
    assert not seen.fetched
    assert all(not re.match(r"\w+:", link) and (folder.path / link).exists() for link in seen.links)
    assert all(content.startswith(b"\x89PNG") for _, content in seen.images)
    assert PNG in [content for _, content in seen.images]
    drawn = " ".join(alt for alt, _ in seen.images)
    for what in DRAWN:
        assert what in drawn, what


def test_its_figures_are_those_of_the_run(folder):
    seen = read(lived(folder)).sections
    assert "finished after step 24 of 24" in seen["Summary"]
    assert "4.9000 (step 1) → 2.6000 (step 24)" in seen["Summary"]
    assert "5.5000 (step 0) → 2.5000 (step 24), nats per byte" in seen["Summary"]
    assert "failures survived 1" in seen["Summary"]
    assert "all 9.000 9.000" in seen["Traffic"]
    assert f"rank 1: {PROCESS_DIED}" in seen["Launches and failures"]
    assert "rank 1 is slow" in seen["Health"]
    assert "optimizer.lr 0.003 → 0.002" in seen["Configuration"]
    assert "torch 2.99" in seen["Versions"]
    assert "a-host" in seen["Where everything is"]
    assert "step_00000024" in seen["Where everything is"]


def test_what_is_nested_in_an_event_is_said_in_words(folder):
    folder.record("failure", ranks={"0": "Timed out"}, hung={"1": "does not answer"})
    folder.record("first steps", seconds={"Ray": 5.3, "processes": 9.8})
    said = read(folder).sections["Launches and failures"]
    assert "rank 0: Timed out; rank 1 does not answer" in said
    assert "seconds Ray 5.3, processes 9.8" in said


def answered(step: int, recall: float) -> dict:
    by_length = {
        "256": {"accuracy": recall, "answers": 8, "by_depth": [recall, recall, recall, recall, None]},
        "128": {"accuracy": 1.0, "answers": 4, "by_depth": [1.0, 1.0, 1.0, 1.0, None]},
    }
    return {
        "kind": "tasks", "step": step,
        "tasks": {"recall": {"accuracy": recall, "answers": 12, "by_length": by_length}},
    }  # fmt: skip


def test_answers_are_shown_by_step_length_and_depth(folder):
    assert "Tasks" not in read(lived(folder)).sections
    write(folder, answered(0, 0.125), answered(24, 0.75))
    shown = read(folder)
    told = " ".join(shown.sections["Tasks"].split())
    assert told == "task right, step 24 answers 256 bytes 128 bytes recall 75.0% 12 75.0% 100.0%"
    titles = [alt for alt, _ in shown.images]
    assert "share of the answers that are right by step: recall" in titles
    assert "recall: right answers, step 24 by bytes and fifth of the text, from its beginning" in titles
    assert "tasks" not in shown.sections["Health"]


@pytest.mark.parametrize(
    ("attention", "named", "said"),
    [("dense", "dense", "The run's attention is dense"), ("[nsa, dense]", "nsa, dense", "is drawn when a run")],
)
def test_the_attention_of_a_run_is_named(tmp_path, attention, named, said):
    alone = ["parallel.context_parallel_size=1", "model.num_layers=2", f"model.attention={attention}"]
    with claimed(tiny(tmp_path, *alone)) as folder:
        shown = read(folder)
    assert f"attention {named}" in " ".join(shown.sections["Summary"].split())
    assert said in shown.sections["Selection"]


def test_losses_of_a_tokenizers_tokens_are_by_token(folder):
    path = folder.path / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"] = {**config.get("data", {}), "tokens": "/somewhere/else"}
    path.write_text(yaml.safe_dump(config))
    seen = read(lived(folder)).sections
    assert "2.5000 (step 24), nats per token" in seen["Summary"]


def test_losses_of_multi_token_prediction_are_drawn_beside_the_loss(folder):
    assert not any("mtp" in alt for alt, _ in read(lived(folder)).images)
    write(folder, *(train(step, mtp_loss=[5.5, None if step == 2 else 6.0]) for step in range(1, 25)))
    (drawn,) = (alt for alt, _ in read(folder).images if "training" in alt)
    assert "mtp_loss/0" in drawn
    assert "mtp_loss/1" in drawn


def test_losses_by_place_and_of_far_context_are_drawn(folder):
    lived(folder)
    by_place = {"64": 5.0, "128": 4.5}
    write(
        folder,
        *({"kind": "validation", "step": step, "loss": 4.7, "by_position": by_place} for step in (0, 12)),
        {"kind": "far_context", "step": 12, "kept": 80, "tokens": 160, "loss": 4.0, "loss_scrambled": 4.1},
    )
    images = [alt for alt, _ in read(folder).images]
    (drawn,) = (alt for alt in images if "by place" in alt)
    assert "up to 64" in drawn
    assert "up to 128" in drawn
    assert any("loss_scrambled" in alt for alt in images)


def test_it_has_no_secret_even_where_the_configuration_has(folder):
    path = folder.path / "config.yaml"
    path.write_text(path.read_text().replace("HF_TOKEN: null", f"HF_TOKEN: {SECRET}"))
    assert SECRET in path.read_text()
    page.write(folder)
    text = folder.report.read_text()
    assert SECRET not in text
    assert "kept out of this file" in text
    assert "NCCL_DEBUG: INFO" in text


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "prepared, never launched"),
        ([("launch", {}), ("start", {"step": 0})], "not at its end"),
        ([("start", {"step": 0}), ("stop", {"step": 3})], "stopped after step 3 of 24; resume=true goes on with it"),
        ([("start", {"step": 0}), ("gave up", {"step": 3})], "ended by itself after step 3 of 24"),
        ([("launch", {}), ("refused", {"reason": "too few <texts>"})], "refused: too few <texts>"),
    ],
)
def test_a_run_that_is_not_at_its_end_has_one_too(folder, events, state):
    for event, details in events:
        folder.record(event, **details)
    if events:
        write(folder, train(3))
    seen = read(folder).sections
    assert state in seen["Summary"]
    assert "drawn when a run has made its last step" in seen["Selection"]


SPOILED = [
    '{"kind": "tr',
    '{"kind": "train", "step": "x", "loss": 1}',
    '{"kind": "train", "step": 3, "loss": 2.0, "tokens_per_s": "fast", "grad_norm": null}',
    '{"kind": "train", "step": 4, "loss": NaN, "lr": Infinity}',
    '{"kind": "train", "step": 5, "loss": 2.0, "mtp_loss": 3}',
    '{"kind": "train", "step": 6, "loss": 2.0, "mtp_loss": {"a": [null, "b"]}}',
    '{"kind": "validation", "step": 7, "loss": 2.0, "by_position": [{"64": "a"}, null]}',
    '{"kind": "traffic", "step": 5}',
    '{"kind": "traffic", "step": 6, "sent_bytes": [1], "layers": {"1": 3}, "union_fraction": {}}',
    '{"kind": "traffic", "step": 7, "sent_bytes": {"a": "b"}, "layers": {"1": {"union_fraction": [[1]]}}}',
    '{"kind": "health", "step": 8, "a": {"b": {"c": [1, [2, [3]]]}}, "<b>": true}',
    '{"kind": "<script>", "step": 1, "x": 1}',
    '{"kind": ["list"], "step": 1}',
    '{"kind": "start", "step": 9, "changed": [1]}',
    "[]",
]


def test_what_is_spoiled_takes_nothing_else_away(folder):
    lived(folder)
    write(folder, *SPOILED)
    with folder.launches.open("a") as file:
        file.write('{"event": 3}\n{"time": []}\nnonsense\n{"event": "failure", "ranks": 3}\n')
    folder.topology.write_text("[1, {")
    seen = read(folder)
    assert "finished after step 24 of 24" in seen.sections["Summary"]
    assert "metrics.jsonl 2 lines are no records" in seen.sections["Summary"]
    assert "launches.jsonl 1 lines are no records" in seen.sections["Summary"]
    assert not seen.fetched
    drawn = " ".join(alt for alt, _ in seen.images)
    assert all(what in drawn for what in ("training", "MB sent", "gates", "memory_bytes"))


@pytest.mark.parametrize("line", SPOILED)
def test_a_spoiled_record_alone_is_no_reason_to_fail(folder, line, monkeypatch):
    monkeypatch.setattr(charts, "_png", lambda _: PNG)
    write(folder, line)
    assert "prepared, never launched" in read(folder).sections["Summary"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "launches.jsonl", "config.yaml", "topology.json", "selection.png"])
def test_files_may_be_missing_or_anything(folder, name, monkeypatch):
    monkeypatch.setattr(charts, "lines", lambda *_, **__: charts.image(PNG, "x"))
    lived(folder)
    for content in (os.urandom(100), b"[" * 100_000, None):
        (folder.path / name).unlink()
        if content is not None:
            (folder.path / name).write_bytes(content)
        read(folder)
        (folder.path / name).touch()


def test_long_lines_are_thinned_out():
    points = [(i, float(i)) for i in range(100_001)]
    assert len(thinned(points)) <= 2001
    assert thinned(points)[-1] == points[-1]
    assert thinned(points[:1]) == points[:1]
    assert thinned(points[:7]) == points[:7]


# --- the command, and who may write where ---------------------------------------------------------------------------


def test_the_command_writes_and_says_where(folder, tmp_path, capsys):
    lived(folder)
    assert cli.main(["report", str(folder.path)]) == exit_codes.OK
    assert capsys.readouterr().out == f"{folder.path / 'report.html'}\n"
    assert cli.main(["report", str(folder.path), "--out", str(tmp_path / "other.html")]) == exit_codes.OK
    Page((tmp_path / "other.html").read_text())


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == exit_codes.BAD_CONFIG
    assert "has no run.json, so it is not the folder of a run; name a run's output_dir" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(folder.path), "--out", str(tmp_path / "file/x.html")]) == exit_codes.BAD_CONFIG
    assert "name another file with --out" in capsys.readouterr().err


def forget(folder: RunFolder) -> None:
    """The marker as a version without reports wrote it."""
    marker = RunMarker.read(folder.path)
    marker.changed(made=tuple(name for name in marker.made if name != "report.html")).write(folder.path)


def test_the_marker_of_an_earlier_version_learns_the_name(folder):
    forget(folder)
    page.write(folder)
    assert "report.html" in RunMarker.read(folder.path).made


def test_a_file_of_the_users_is_not_overwritten(folder, tmp_path):
    forget(folder)
    folder.report.write_text("mine")
    with pytest.raises(Refused, match="the run did not make it, so it is not overwritten; move it away"):
        page.write(folder)
    assert folder.report.read_text() == "mine"
    page.write(folder, tmp_path / "other.html")


def test_the_marker_of_a_run_at_work_is_its_own(tmp_path):
    with claimed(tiny(tmp_path)) as folder:
        page.write(folder)
        folder.report.unlink()
        forget(folder)
        with pytest.raises(Refused, match=r"a launch of an earlier version is at work.*name another file with --out"):
            page.write(folder)


def test_overwriting_a_run_removes_its_report(tmp_path, folder):
    page.write(lived(folder))
    with claimed(tiny(tmp_path, "overwrite=true")):
        assert not folder.report.exists()
    assert "report.html" in LAUNCHED


def test_a_run_says_where_its_report_is_and_does_not_fail_of_it(tmp_path, folder, capsys, monkeypatch):
    lived(folder)
    with Console(tiny(tmp_path), folder) as console:
        console.finish({"step": 24, "stopped": False})
        assert f"report       {folder.report}" in capsys.readouterr().out.splitlines()
        monkeypatch.setattr(page, "of", lambda _: 1 / 0)
        console.finish({"step": 24, "stopped": False})
    said = capsys.readouterr().out
    assert f"could not be written (ZeroDivisionError: division by zero); nsa-dist report {folder.path} tries" in said
