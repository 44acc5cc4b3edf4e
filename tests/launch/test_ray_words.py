"""What the launcher makes of Ray's exceptions and states, without a Ray."""

import ast
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.exceptions
from ray._private import worker

from launch_cases import tiny
from nsa_launch.console import Console
from nsa_launch.on_ray import autoscaler, failures, session
from nsa_launch.on_ray.shown import messages, prometheus
from nsa_launch.on_ray.shown.startup import Startup
from nsa_launch.run_folder import OUT_OF_MEMORY, PROCESS_DIED, claimed

PANELS = Path(__file__).parents[2] / "launchers/grafana/nsa-dist.json"
PARAGRAPH = "\x1b[36m(raylet)\x1b[0m A worker died or was killed while executing a task.\x07 " + "word " * 200


def test_a_paragraph_becomes_one_plain_line():
    line = failures.plain(PARAGRAPH)
    assert line.startswith("(raylet) A worker died or was killed while executing a task. word")
    assert line.endswith("word ...")
    assert len(line) <= failures.LONGEST
    assert line.isprintable()
    assert failures.plain("\x1b]8;;x\x1b\\short\n text") == "short text"


def test_what_ray_says_unasked_is_one_line_and_not_repeated():
    said: list[str] = []
    with messages.shortened(said.append):
        for _ in range(2):
            worker.print_to_stdstream({"lines": [PARAGRAPH], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert len(said) == 1
    assert said[0].startswith("Ray says: (raylet) A worker died")
    assert len(said[0]) < 260
    assert said[0].isprintable()
    calls = [
        node.func
        for node in ast.walk(ast.parse(inspect.getsource(worker.listen_error_messages)))
        if isinstance(node, ast.Call)
    ]
    assert "print_to_stdstream" in [ast.unparse(call) for call in calls]  # it is what Ray calls
    assert worker.print_to_stdstream.__module__ == "ray._private.worker"  # and not ours any more


class HealthCheck(Exception):
    def __init__(self, found: Exception) -> None:
        super().__init__("a health check failed")
        self.health_check_failure = found


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HealthCheck(ray.exceptions.ActorDiedError()), PROCESS_DIED),
        (HealthCheck(ray.exceptions.OutOfMemoryError(PARAGRAPH)), OUT_OF_MEMORY),
        (ray.exceptions.OutOfMemoryError(PARAGRAPH), OUT_OF_MEMORY),
        (RuntimeError(f"{PARAGRAPH}\nthe last \x1b[31mline\x1b[0m\n"), "the last line"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_reason_is_one_line(error, said):
    assert failures.reason(error) == said


def test_a_controller_without_memory_is_launched_again():
    assert failures.controller_died(ray.exceptions.OutOfMemoryError("x"))
    assert failures.controller_died(ray.exceptions.ActorDiedError())
    assert not failures.controller_died(RuntimeError())
    assert not failures.controller_died(None)


def test_ranks_without_memory_are_told_what_to_change(tmp_path, capsys):
    with claimed(tiny(tmp_path)) as folder, Console(tiny(tmp_path), folder) as console:
        folder.record("failure", ranks={"0": "Connection closed by peer", "1": OUT_OF_MEMORY})
        console.update()
    said = capsys.readouterr().out
    assert "rank 1: Ray's memory monitor killed it" in said
    assert "launch.processes_per_node" in said
    assert "all ranks start again from the last checkpoint (1 of 3 times)" in said


def test_every_panel_draws_a_metric_that_exists():
    panels = json.loads(PANELS.read_text())["panels"]
    drawn = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"\w*nsa\w+", target["expr"])
    }
    assert drawn == {f"ray_{name}" for name in prometheus.NAMES}
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_a_record_fills_the_gauges(monkeypatch):
    filled = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            assert description
            self.name, self.keys = name, set(tag_keys)

        def set(self, value, tags):
            assert set(tags) == self.keys
            filled[self.name, tags.get("kind")] = value

    monkeypatch.setattr(prometheus, "Gauge", Gauge)
    metrics = prometheus.RunMetrics("run")
    train = {"step": 7, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 100.0, "tokens": 700}
    metrics.feed({"kind": "start", "step": 0})
    metrics.feed({"kind": "train", **train})
    metrics.feed({"kind": "validation", "step": 7, "loss": 3.0})
    metrics.feed(
        {"kind": "traffic", "sent_bytes": {"halo": 5, "pages": 8}, "union_fraction": 0.5, "load_imbalance": 1.25}
    )
    assert filled == {
        ("nsa_step", None): 7,
        ("nsa_loss", None): 2.5,
        ("nsa_grad_norm", None): 1.0,
        ("nsa_learning_rate", None): 1e-3,
        ("nsa_tokens_per_second", None): 100.0,
        ("nsa_tokens", None): 700,
        ("nsa_validation_loss", None): 3.0,
        ("nsa_union_fraction", None): 0.5,
        ("nsa_load_imbalance", None): 1.25,
        ("nsa_sent_bytes", "halo"): 5,
        ("nsa_sent_bytes", "pages"): 8,
    }
    assert prometheus.MemoryMetrics("run", 1).read()["nsa_host_memory_bytes"] > 10**6


def test_what_the_autoscaler_does_in_words():
    node, launch = SimpleNamespace(ray_node_type_name="gpu"), SimpleNamespace
    status = SimpleNamespace(
        pending_nodes=[node, node],
        pending_launches=[launch(ray_node_type_name="gpu", count=3), launch(ray_node_type_name="big", count=1)],
        failed_launches=[launch(ray_node_type_name="gpu", count=1, details="no\n quota")],
    )
    assert autoscaler.described(status) == "coming up: 1 x big, 5 x gpu; could not be launched: 1 x gpu (no quota)"
    nothing = SimpleNamespace(pending_nodes=[], pending_launches=[], failed_launches=[])
    assert autoscaler.described(nothing) == ""


@pytest.mark.parametrize(("gpus", "device", "said"), [(0, "cpu", True), (8, "cuda", False)])
def test_cpus_by_default_are_said(tmp_path, monkeypatch, gpus, device, said):
    monkeypatch.setattr(session, "gpus_of_a_node", lambda: gpus)
    words: list[str] = []
    assert session.processes_of_cluster(tiny(tmp_path, "device=auto"), words.append).device == device
    assert bool(words) == said
    assert not said or "launch.device=cuda waits" in words[0]


def test_the_way_to_the_first_step_is_told_once():
    words, now = [], [100.0]
    startup = Startup(words.append, began_s=97.0, clock=lambda: now[0])
    now[0] = 110.0
    startup.reached("Ray")
    startup.wait()
    assert words == []
    now[0] = 126.0
    startup.wait(lambda: "the cluster lacks 2 GPUs")
    startup.wait(lambda: "not so soon again")
    assert words == ["the ranks' processes are starting (16 s so far); the cluster lacks 2 GPUs"]
    now[0] = 130.0
    startup.reached("imports")  # what came before it went unseen
    startup.reached("processes")
    now[0] = 131.5
    startup.reached("first steps")
    startup.reached("first steps")
    now[0] = 200.0
    startup.wait()
    assert words[1:] == [
        "first training record 34.5 s after the start (command 3.0, Ray 10.0, imports 20.0, first steps 1.5)"
    ]
