"""`nsa-dist plan` as a person runs it."""

import json
from pathlib import Path

import pytest

from nsa_dist.planner.cluster import DEFAULT_CLUSTER
from nsa_launch import exit_codes
from nsa_launch.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_every_configuration(config, tmp_path, capsys):
    picture, report = tmp_path / "below" / "plan.png", tmp_path / "plan.json"
    assert main(["plan", str(config), "--json", str(report), "--picture", str(picture)]) == exit_codes.OK
    data = json.loads(report.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert data["best_cp_size"] in [candidate["cp_size"] for candidate in data["candidates"]]
    assert data["verdict"]
    assert data["caveats"]
    printed = capsys.readouterr().out
    for heading in ("Memory of the fullest GPU", "Seconds of one step", "On the wire", "Verdict", "What this is worth"):
        assert heading in printed
    assert all(line in printed for line in data["verdict"])


def test_options_reach_the_plan(tmp_path):
    report = tmp_path / "plan.json"
    words = ["plan", str(CONFIGS / "long-1m.yaml"), "num_layers=2", "keep_pages=true"]
    words += [f"kv_fetch_budget_bytes={3 * 2**29}", "--cluster", str(DEFAULT_CLUSTER), "--nodes", "2"]
    words += ["--cp", "8,16", "--u", "0.5", "--overlap", "0.5"]
    assert main([*words, "--json", str(report)]) == exit_codes.OK
    data = json.loads(report.read_text())
    assert [candidate["cp_size"] for candidate in data["candidates"]] == [8, 16]
    assert data["config"]["model"]["num_layers"] == 2
    assert data["cluster"]["num_nodes"] == 2
    assert data["options"] == {
        "union_fractions": [0.5],
        "kv_fetch_budget_bytes": 3 * 2**29,
        "keep_pages": True,
        "overlap": 0.5,
    }


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--cluster", "nowhere.yaml"], "pass --cluster FILE"),
        (["--cp", "3"], "take a size that divides them"),
        (["--u", "7"], "pass for example --u"),
        (["context_parallel_sise=2"], "did you mean"),
    ],
    ids=["cluster", "cp", "u", "override"],
)
def test_mistakes_are_refused_with_a_remedy(words, remedy, capsys):
    overrides = [word for word in words if "=" in word]
    options = [word for word in words if "=" not in word]
    code = main(["plan", str(CONFIGS / "tiny-cpu.yaml"), *overrides, *options])
    assert code == exit_codes.BAD_CONFIG
    assert remedy in capsys.readouterr().err
