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
    assert main(["plan", str(config), "--full", "--json", str(report), "--picture", str(picture)]) == exit_codes.OK
    data = json.loads(report.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert data["best_cp_size"] in [candidate["cp_size"] for candidate in data["candidates"]]
    assert data["verdict"]
    assert data["caveats"]
    printed = capsys.readouterr().out
    for heading in ("Memory of the fullest GPU", "Seconds of one step", "On the wire", "Verdict", "What this is worth"):
        assert heading in printed
    assert all(line in printed for line in data["verdict"])


LONG = str(CONFIGS / "long-1m.yaml")


@pytest.mark.parametrize(
    ("words", "first", "second", "third"),
    [
        (
            [],
            "Fits 8 x H200, one node, as configured: cp 8 takes",
            "Take parallel.context_parallel_size=8, as configured: the only size that fits.",
            "A step at cp 8 takes",
        ),
        (
            ["context_parallel_size=2"],
            "Does not fit 8 x H200, one node, as configured: cp 2 takes",
            "Take parallel.context_parallel_size=8, instead of 2: the only size that fits.",
            "A step at cp 8 takes",
        ),
        (
            ["context_parallel_size=4", "--cp", "8"],
            "Fits 8 x H200, one node, with cp 8:",
            "Take parallel.context_parallel_size=8, instead of 4",
            "A step at cp 8 takes",
        ),
        (
            ["--cp", "1,2"],
            "Does not fit 8 x H200, one node: of cp 1, 2 the least is cp 2, which takes",
            "Take parallel.context_parallel_size=8, which was not planned: it fits.",
            "A step at cp 2 takes",
        ),
        (
            ["num_layers=8"],
            "Does not fit 8 x H200, one node: of cp 1, 2, 4, 8 the least is cp 8",
            "Take run.sequence_length=524288 parallel.context_parallel_size=8: then it fits.",
            "A step at cp 8 takes",
        ),
        (
            ["recompute_attention=false", "num_layers=5"],
            "Does not fit 8 x H200, one node: of cp 1, 2, 4, 8 the least is cp 8",
            "Take model.recompute_attention=true parallel.context_parallel_size=8: then it fits.",
            "A step at cp 8 takes",
        ),
        (
            ["num_layers=80"],
            "Does not fit 8 x H200, one node: of cp 1, 2, 4, 8 the least is cp 8",
            "Take more GPUs, a shorter sequence or a smaller model: no single change is enough.",
            "A step at cp 8 takes",
        ),
    ],
    ids=["as configured", "another size", "not planned", "only others fit", "half as long", "one change", "nothing"],
)
def test_the_verdict_is_three_lines(words, first, second, third, tmp_path, capsys):
    report = tmp_path / "plan.json"
    assert main(["plan", LONG, *words, "--json", str(report)]) == exit_codes.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(start) for line, start in zip(lines, (first, second, third), strict=False)] == [True] * 3
    assert lines[3:5] == ["", "Tables, constants, and what this is worth: --full"]
    assert lines[5:] == [f"wrote {report}"]
    data = json.loads(report.read_text())
    size = data["best_cp_size"] or int(third.split()[4])
    (shown,) = (c["strategies"][0] for c in data["candidates"] if c["cp_size"] == size)
    assert f"{shown['step_s']:.2f} s by the model" in lines[2]
    assert f"holds {shown['total_memory_bytes'] / 2**30:.1f} GiB of 139.0 GiB." in lines[2]


def test_full_opens_with_the_same_lines(capsys):
    main(["plan", LONG])
    short = capsys.readouterr().out.splitlines()
    assert main(["plan", LONG, "--full"]) == exit_codes.OK
    assert capsys.readouterr().out.splitlines()[:3] == short[:3]


def test_the_cache_of_inference(tmp_path, capsys):
    report = tmp_path / "plan.json"
    words = ["--cp", "4,8", "--context", "65536", "--sequences", "8", "--json", str(report)]
    assert main(["plan", LONG, *words]) == exit_codes.OK
    four, eight = json.loads(report.read_text())["inference"]
    assert (four["cp_size"], four["num_sequences"], eight["cp_size"]) == (4, 8, 8)
    printed = capsys.readouterr().out
    what = "8 sequences of 65,536 tokens over 4 GPUs, compressed rows replicated"
    assert f"Inference, {what}: 2,560 bytes a token and layer" in printed  # 128 of them on every GPU
    for plan in (four, eight):
        assert plan["cmp_placement"] == "replicated"
        assert plan["sharded_bytes"] < plan["replicated_bytes"] == plan["cache_bytes"]
    (longest,) = (line for line in printed.splitlines() if "longest, tokens" in line)
    assert [word for word in longest.split() if word[0].isdigit()] == [f"{x['longest']:,}" for x in (four, eight)]


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
        "domain_size": None,
        "overlap": 0.5,
    }


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--cluster", "nowhere.yaml"], "pass --cluster FILE"),
        (["--cp", "3"], "take a size that divides them"),
        (["--u", "7"], "pass for example --u"),
        (["context_parallel_sise=2"], "did you mean"),
        (["--sequences", "4"], "give --context TOKENS, too"),
        (["--context", "0"], "give for example --context 65536"),
    ],
    ids=["cluster", "cp", "u", "override", "sequences", "context"],
)
def test_mistakes_are_refused_with_a_remedy(words, remedy, capsys):
    overrides = [word for word in words if "=" in word]
    options = [word for word in words if "=" not in word]
    code = main(["plan", str(CONFIGS / "tiny-cpu.yaml"), *overrides, *options])
    assert code == exit_codes.BAD_CONFIG
    assert remedy in capsys.readouterr().err
