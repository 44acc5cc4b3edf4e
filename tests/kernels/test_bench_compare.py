"""The benchmark's `--compare`, on made-up results: what is slower is named, and nothing is passed over in silence."""

import json
from pathlib import Path

import pytest
import torch

from nsa_kernels.bench import run
from nsa_kernels.bench.cases import PRESETS
from nsa_kernels.bench.compare import Stored
from nsa_kernels.bench.report import Report
from nsa_kernels.bench.table import LINES, figures
from nsa_kernels.bench.timing import Timer

BASELINE = Path(__file__).parents[2] / "kernels/bench/baseline-h200.json"
CASE = PRESETS["smoke"][0]
CARD = "NVIDIA H200"
# Every step of a case: milliseconds forward, backward.
TIMES = {
    "compress k": (1.0, 2.0),
    "compress v": (1.0, 2.0),
    "cmp": (20.0, 60.0),
    "select": (10.0, None),
    "slc": (12.0, 24.0),
    "win": (3.0, 9.0),
    "combine": (2.5, None),
    "gate_deltas": (None, 1.5),
    "sum_branches": (None, 1.0),
    "all": (50.0, 100.0),
    "all, captured": (40.0, 90.0),
    "dense": (100.0, 300.0),
}


def rows(spread_ms: float = 0.0, **changed) -> list[dict]:
    """The steps of a case; `changed` has other times by step, or None for one that failed."""
    times = {**TIMES, **changed}
    return [row(step, pair, spread_ms) for step, pair in times.items()]


def row(step: str, pair: tuple[float | None, ...] | None, spread_ms: float) -> dict:
    if pair is None:
        return {"step": step, "note": "FAILED: OutOfResources"}
    timed = {d: ms for d, ms in zip(("forward", "backward"), pair, strict=True) if ms is not None}
    return {"step": step, **{f"{d}_ms": ms for d, ms in timed.items()}, **{f"{d}_spread_ms": spread_ms for d in timed}}


def as_case(name: str, found: list[dict], tokens: int = 65536) -> dict:
    return {"case": name, "tokens": tokens, "rows": found}


def bench_file(folder: Path, *cases: tuple[str, list[dict]], device: str = CARD) -> Path:
    path = folder / "stored.json"
    machine = {"device": device, "torch": "2.11", "date": "2026-01-01"}
    path.write_text(json.dumps({"machine": machine, "cases": [as_case(name, r) for name, r in cases]}))
    return path


def words(folder: Path, now: list[dict], **stored) -> dict[tuple[str, str], str]:
    """(line, direction) -> its judgement against the usual times."""
    before = Stored.read(bench_file(folder, ("a", rows(**stored))))
    return {
        (line.name, line.direction): line.word for line in before.compare({"device": CARD}, [as_case("a", now)]).lines
    }


def test_the_same_is_as_before(tmp_path):
    found = words(tmp_path, rows())
    assert found.pop(("dense, cuDNN", "forward")) == found.pop(("dense, cuDNN", "backward")) == "not judged"
    assert set(found.values()) == {"as before"}
    assert {name for name, _ in found} == LINES.keys() - {"dense, cuDNN"}
    assert ("select", "backward") not in found


def test_five_percent_and_the_spread_of_both_are_allowed(tmp_path):
    """20 ms stored: the limit is 21, and 0.5 more where either side has that spread."""
    assert words(tmp_path, rows(cmp=(20.9, 60.0)))["cmp", "forward"] == "as before"
    assert words(tmp_path, rows(cmp=(21.1, 60.0)))["cmp", "forward"] == "slower"
    assert words(tmp_path, rows(cmp=(21.4, 60.0)), spread_ms=0.5)["cmp", "forward"] == "as before"
    assert words(tmp_path, rows(cmp=(21.4, 60.0), spread_ms=0.5))["cmp", "forward"] == "as before"
    assert words(tmp_path, rows(cmp=(22.1, 60.0), spread_ms=0.5), spread_ms=0.5)["cmp", "forward"] == "slower"
    assert words(tmp_path, rows(cmp=(18.9, 60.0)))["cmp", "forward"] == "faster"
    assert words(tmp_path, rows(cmp=(18.9, 60.0)), spread_ms=0.2)["cmp", "forward"] == "as before"


def test_a_line_is_the_sum_of_its_steps(tmp_path):
    found = words(tmp_path, rows(gate_deltas=(None, 1.7)))
    assert found["combine / deltas and sum of dq", "backward"] == "slower"
    assert found["combine / deltas and sum of dq", "forward"] == "as before"


def test_a_sum_that_lacks_a_step_is_no_time(tmp_path):
    """One of two compressions alone is half as long, which must not pass for faster."""
    now = rows(**{"compress v": None})
    assert words(tmp_path, now)["compress, k and v", "forward"] == "no time now"


def test_dense_attention_is_shown_and_not_judged(tmp_path):
    assert words(tmp_path, rows(dense=(200.0, 600.0)))["dense, cuDNN", "forward"] == "not judged"
    left_out = [row for row in rows() if row["step"] != "dense"]
    assert words(tmp_path, left_out)["dense, cuDNN", "forward"] == "not run now"


def test_what_the_host_paces_is_shown_and_not_judged(tmp_path):
    """Lines under 2 ms, and short sequences but for their CUDA graphs."""
    slow = rows(**{"compress k": (0.9, 4.0), "all": (90.0, 100.0), "all, captured": (80.0, 90.0)})
    stored = Stored.read(bench_file(tmp_path, ("a", rows(**{"compress k": (0.1, 2.0), "compress v": (0.1, 2.0)}))))
    for tokens, judged in ((65536, "slower"), (16384, "not judged")):
        lines = stored.compare({"device": CARD}, [as_case("a", slow, tokens)]).lines
        found = {(line.name, line.direction): line.word for line in lines}
        assert found["compress, k and v", "forward"] == "not judged"
        assert found["compress, k and v", "backward"] == found["all", "forward"] == judged
        assert found["all, captured in CUDA graphs", "forward"] == "slower"


def test_what_is_missing_or_new_is_named(tmp_path):
    stored = Stored.read(bench_file(tmp_path, ("a", rows(slc=None)), ("b", rows())))
    now = [as_case("a", rows(win=None)), as_case("c", rows())]
    comparison = stored.compare({"device": CARD, "torch": "2.13"}, now)
    text = comparison.text()
    assert comparison.failed
    assert "not run now, though stored: b" in text
    assert "no time now: a, win, forward" in text
    assert "new: a, slc, backward" in text
    assert "new: c, all, forward" in text
    assert "torch 2.11" in text
    assert "torch 2.13" in text
    assert "nothing is slower" not in text


def test_what_got_slower_is_named(tmp_path):
    stored = Stored.read(bench_file(tmp_path, ("a", rows())))
    comparison = stored.compare({"device": CARD}, [as_case("a", rows(slc=(12.0, 30.0), select=(8.0, None)))])
    assert comparison.failed
    lines = comparison.text().splitlines()
    assert "slower: a, slc, backward" in lines
    assert "faster: a, select, forward" in lines
    assert any(line.split() == ["slc", "backward", "24.00", "30.00", "1.25x", "slower"] for line in lines)


@pytest.mark.parametrize(
    ("device", "case", "remedy"),
    [
        ("NVIDIA H100", "a", "pass a bench.json of NVIDIA H100, or leave --compare out"),
        (CARD, "b", "choose with --preset and --only among those that it has: a"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, device, case, remedy):
    with pytest.raises(ValueError, match=remedy):
        Stored.read(bench_file(tmp_path, ("a", rows()))).check(device, [case])


@pytest.mark.parametrize("text", ["", "[]", '{"machine": {}, "cases": []}', '{"machine": {"device": "x"}}', "[1"])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"pass the bench\.json that an earlier run wrote"):
        Stored.read(path)


@pytest.mark.parametrize(
    ("times_ms", "row"),
    [
        ([9.0, 5.0, 1.0, 2.0], {"forward_ms": 2.0, "forward_spread_ms": 2.0}),  # the first one warms up
        ([800.0, 700.0], {"forward_ms": 700.0}),
    ],
    ids=["three", "one"],
)
def test_a_measurement_has_a_spread_where_it_was_repeated(monkeypatch, times_ms, row):
    monkeypatch.setattr(Timer, "__init__", lambda *_: None)
    timer, runs = Timer(), iter(times_ms)
    timer.seconds, timer.max_runs, timer.long_s = 0.0, 50, 0.7
    monkeypatch.setattr(timer, "_run", lambda *_: next(runs))
    assert timer.row("forward", lambda: None) == row


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A GPU that is not there, and what the benchmark finds on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)

    def set_rows(found: list[dict]) -> None:
        def measure(args, cases):
            report = Report(args.out, {"device": CARD})
            for case in cases:
                report.add(case, found)
            return report

        monkeypatch.setattr(run, "_measure", measure)

    return set_rows


@pytest.mark.parametrize(("ms", "status"), [(40.0, 0), (30.0, 0), (60.0, 1)], ids=["same", "faster", "slower"])
def test_the_exit_status(measured, tmp_path, capsys, ms, status):
    measured(rows(**{"all, captured": (ms, 90.0)}))
    stored = bench_file(tmp_path, (CASE.name, rows()))
    asked = ["--out", str(tmp_path / "out"), "--preset", "smoke", "--compare", str(stored)]
    assert run.main(asked) == status
    written = (tmp_path / "out/compare.txt").read_text()
    assert written in capsys.readouterr().out
    assert (f"slower: {CASE.name}, all, captured in CUDA graphs, forward" in written) == bool(status)
    again = [*asked[:-1], str(tmp_path / "out/bench.json")]  # what a run writes can be compared with
    assert run.main(again) == 0


def test_refusals_come_before_measuring(measured, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "_measure", lambda *_: pytest.fail("it was measured"))
    asked = ["--out", str(tmp_path), "--preset", "smoke"]
    assert run.main([*asked, "--compare", str(bench_file(tmp_path, ("a", rows()), device="another"))]) == 2
    assert "was measured on another and this is NVIDIA H200" in capsys.readouterr().err
    assert run.main([*asked, "--only", "5k"]) == 2
    assert "--only '5k' is part of no case" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(asked) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_stored_baseline_holds_the_table(tmp_path):
    """Every case of the table, with a time in every line that is judged; compared with itself nothing is slower."""
    stored = Stored.read(BASELINE)
    assert list(stored.cases) == [case.name for case in PRESETS["table"]]
    always = LINES.keys() - {"dense, cuDNN", "all, captured in CUDA graphs"}
    for steps in stored.cases.values():
        assert {name for name, _ in figures(steps)} >= always
    stored.check(CARD, [PRESETS["table"][0].name])
    itself = json.loads(BASELINE.read_text())
    assert not stored.compare(itself["machine"], itself["cases"]).failed
