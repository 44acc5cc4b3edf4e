"""`nsa-dist bench cp`: forced selections, one rank of many, and real ranks over gloo, on sizes of seconds."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench_tasks import fails_on_rank_one, is_silent, rank_of
from nsa_dist.bench.predicted import core_of, strategy_of
from nsa_dist.bench.selection import Replay, draw_remote, draw_selection
from nsa_dist.bench.show import timeline
from nsa_dist.bench.show.report import Report, machine
from nsa_dist.bench.sizes import TINY
from nsa_dist.bench.solo import measure_share, run_solo
from nsa_dist.bench.synthetic import SyntheticComm
from nsa_dist.bench.tasks import Compare
from nsa_dist.bench.world import Place
from nsa_dist.cp.formulas import cost
from nsa_dist.cp.trace import Span
from nsa_dist.planner.core import strategies
from nsa_dist.planner.core.strategies import Options
from nsa_launch import exit_codes
from nsa_launch.bench.team import TaskFailed, Team
from nsa_launch.bench.training import Split, judge
from nsa_launch.cli import main

CPU = torch.device("cpu")
CASE = TINY.case(8192, 4)  # 128 blocks, 32 a rank


# --- Selections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("u", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_union_is_the_one_asked_for(rank, u, layout):
    case = replace(CASE, layout=layout)
    plan, cfg = case.plan(), case.cfg
    draw = draw_selection(plan, cfg, rank, 2, u, CPU)
    visible = sum(cost.visible_remote_blocks(plan)[rank])
    reached = draw.remote.sum(1)
    expected = min(round(u * 96), visible)
    forced = draw_remote(plan, cfg, rank, 0.0).sum()
    assert reached.tolist() == [max(expected, forced)] * 2
    assert draw.union_fractions == pytest.approx([max(expected, forced) / 96] * 2)


def test_drawn_blocks_are_such_as_a_query_can_choose():
    plan, cfg = CASE.plan(), CASE.cfg
    ids = draw_selection(plan, cfg, 1, 2, 0.2, CPU).block_indices.long()
    own = (plan.stream_positions(1) // 64)[:, None, None]
    chosen = ids >= 0
    assert ids.shape == (2048, 2, 4)
    assert (ids <= own).all()
    assert (ids[..., 1:] > ids[..., :-1])[chosen[..., 1:]].all()  # ascending and distinct, -1 last
    assert (chosen.sum(-1) == (own[..., 0] + 1).clamp(max=4))[own.squeeze() > 20].all()
    for forced in (torch.zeros_like(own), own, (own - 1).clamp(min=0)):
        assert (ids == forced).any(-1).all()


def test_a_drawn_selection_is_given_out_in_parts():
    ids = torch.arange(6 * 4 * 2).reshape(6, 4, 2)
    by_heads, by_halves = Replay(ids), Replay(ids)
    for _ in range(2):  # a second forward begins again
        parts = [by_heads(torch.empty(6, heads, 2)) for heads in (1, 2, 1)]
        assert torch.equal(torch.cat(parts, 1), ids)
        assert torch.equal(torch.cat([by_halves(torch.empty(3, 4, 2)) for _ in range(2)]), ids)


# --- One rank of many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("mode", ["fetch", "whole shard", "all-gather", "shared all-gather"])
def test_a_share_sends_what_the_formulas_say(mode, rank):
    case = replace(CASE, mode=mode, union_fraction=0.3)
    plan, heads = case.plan(), case.heads
    sent = measure_share(case, CPU, rank, repeats=0)["sent_bytes"]
    shard_bytes = 2048 * 2 * (16 + 16) * 4
    if mode == "all-gather":  # 3 branches, to 3 other ranks: S forward; S again and S of fp32 gradients
        assert sent == {"raw": 2 * 3 * 3 * shard_bytes, "raw.grad": 3 * 3 * shard_bytes}
        return
    if mode == "shared all-gather":  # one pair: a third
        assert sent == {"raw": 2 * 3 * shard_bytes, "raw.grad": 3 * shard_bytes}
        told = strategies.sent_bytes(core_of(case), strategy_of(case), Options())
        assert (sent["raw"], sent["raw.grad"]) == (told["pages"], told["pages.grad"])
        return
    owner, _ = plan.owner(torch.arange(128) * 64)
    wanted = [draw_remote(plan, case.cfg, r, 0.3) for r in range(4)]
    if mode == "whole shard":  # every owner has a block that every other rank chose: the first, or one of 30%
        pages = [[0 if q == r else 64 for q in range(4)] for r in range(4)]
    else:
        pages = [[2 * int(w[owner == q].sum()) for q in range(4)] for w in wanted]
    assert sent == cost.sent_bytes(plan, case.cfg, heads, pages, refetch=True)[rank]


def test_a_case_that_fails_is_a_row_with_its_error(monkeypatch):
    def exhausted(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB\nmore")

    monkeypatch.setattr("nsa_dist.bench.solo.make_shard", exhausted)
    (row,) = run_solo([CASE], CPU)
    assert row["error"] == "out of memory: CUDA out of memory. Tried to allocate 40 GiB"
    assert row["case"] == CASE.name


def test_head_groups_are_timed_one_by_one(tmp_path, capsys):
    words = ["--tokens", "1024", "--head-groups", "1,2,4", "--no-memory-curve", "--repeats", "0", "--device", "cpu"]
    assert main(["bench", "cp", "--out", str(tmp_path), "--cp", "2", "--only", "fetch u=0.2", *words]) == exit_codes.OK
    shares = json.loads((tmp_path / "cp.json").read_text())["shares"]
    ways = ["fetch u=0.2, head groups 1", "fetch u=0.2, head groups 2", "fetch u=0.2"]
    assert [(row["way"], row["head_groups"]) for row in shares] == list(zip(ways, (1, 2, 4), strict=True))
    assert shares[0]["sent_bytes"] == shares[1]["sent_bytes"]


def test_made_up_bitmaps_have_no_heads():
    with pytest.raises(ValueError, match=r"must be \[8, num_blocks\].*leave the heads out"):
        SyntheticComm(num_ranks=8, bitmaps=torch.zeros(8, 4, 64, dtype=torch.bool))


def test_one_rank_of_many_from_the_command_line(tmp_path, capsys):
    words = ["bench", "cp", "--device", "cpu", "--cp", "4", "--tokens", "1024", "--repeats", "1", "--trace"]
    assert main([*words, "--out", str(tmp_path)]) == exit_codes.OK
    data = json.loads((tmp_path / "cp.json").read_text())
    ways = ["fetch u=0.05", "fetch u=0.2", "fetch u=1", "whole shard", "all-gather", "shared all-gather"]
    assert [row["way"] for row in data["shares"]] == ways
    assert not any("error" in row for row in data["shares"] + data["memory"])
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "cp.txt").read_text() == capsys.readouterr().out


# --- Real ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What two ranks over gloo measured: (exit code, folder, data)."""
    folder = tmp_path_factory.mktemp("ranks")
    words = ["bench", "cp", "--device", "cpu", "--ranks", "2", "--tokens", "1024", "--repeats", "1", "--no-training"]
    code = main([*words, "--trace", "--out", str(folder)])
    return code, folder, json.loads((folder / "cp.json").read_text())


def test_real_ranks_equal_one_rank(measured):
    code, _, data = measured
    assert code == exit_codes.OK
    assert [(row["layout"], row["mode"]) for row in data["checks"]] == [
        ("zigzag", "fetch"), ("contiguous", "fetch"), ("zigzag", "all-gather"), ("zigzag", "shared all-gather"),
    ]  # fmt: skip
    for row in data["checks"]:
        assert row["wrong"] == ""
        pairs = 1 if row["mode"] == "shared all-gather" else 3
        assert len(row["errors"]) == 2 + (2 + 2 * pairs) + 6  # out and ids; q, K/V, gates; phi's parameters
        assert max(row["errors"].values()) < 1e-10


def test_real_ranks_are_timed_beside_the_plan(measured):
    _, folder, data = measured
    assert [row["way"] for row in data["cases"]] == [
        "fetch u=0.05", "fetch u=0.2", "fetch u=1", "whole shard", "all-gather", "shared all-gather",
    ]  # fmt: skip
    for row in data["cases"]:
        assert "error" not in row
        assert row["forward_s"] >= row["exposed_s"]["forward"] > 0
        assert len(row["ranks"]) == 2
        assert row["predicted"]["forward_s"] > 0
    full = next(row for row in data["cases"] if row["way"] == "fetch u=1")
    assert {k: v for k, v in full["predicted"]["sent_bytes"].items() if v} == full["sent_bytes"]
    shared = data["cases"][-1]
    told = shared["predicted"]["sent_bytes"]
    assert shared["sent_bytes"] == {"raw": told["pages"], "raw.grad": told["pages.grad"]}
    assert [row["cp_size"] for row in data["scaling"]] == [1, 2]
    assert all(row["share_efficiency"] > 0 for row in data["scaling"])
    assert {row["collective"] for row in data["links"]} == {"all_gather", "all_to_all", "reduce_scatter"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("cp.png", "timeline.png"))


def test_what_time_does_not_allow_is_named(tmp_path):
    words = ["bench", "cp", "--device", "cpu", "--ranks", "2", "--budget-s", "0", "--out", str(tmp_path)]
    assert main(words) == exit_codes.OK
    data = json.loads((tmp_path / "cp.json").read_text())
    left_out = " ".join(row["what"] for row in data["not_run"])
    for part in ("comparison of 1k", "links of 2 ranks", "fetch u=0.05", "training with TP 1 x CP 2 x DP 1"):
        assert part in left_out
    assert "cases" not in data


def test_without_pydantic_only_the_predictions_are_left_out(tmp_path):
    """In a process of its own, as this one has imported pydantic."""
    words = [
        "bench",
        "cp",
        "--device",
        "cpu",
        "--ranks",
        "2",
        "--budget-s",
        "0",
        "--no-training",
        "--out",
        str(tmp_path),
    ]
    program = f"import sys; sys.modules['pydantic'] = None; from nsa_launch.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == exit_codes.OK, done.stderr
    reasons = [row["why"] for row in json.loads((tmp_path / "cp.json").read_text())["not_run"]]
    assert [why for why in reasons if why != "the time is over"] == [
        "the planner needs pydantic; pip install --editable '.[train]' installs it"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_a_shared_pair_gathered_by_heads_equals_one_rank(layout):
    """Over four ranks, in fp64: chosen blocks the same, output and every gradient to 1e-10."""
    heads = replace(TINY.heads[0], element_bytes=8)
    with Team(Place(4, "cpu", shared=True)) as team:
        rows = team.run(Compare(TINY.case(1024, 4, heads=heads, mode="shared all-gather", layout=layout)), 120)
    for row in rows:
        assert {"block_indices", "dk", "dv"} <= row["errors"].keys()
        assert "block_indices" in row["same"]
        assert max(row["errors"].values()) < 1e-10


def test_a_team_leaves_a_failed_task_together():
    """One rank fails while the other waits for it in a collective; the next task finds a new team."""
    with Team(Place(2, "cpu", shared=True)) as team:
        assert team.run(rank_of, 60) == [0, 1]
        with pytest.raises(TaskFailed, match="rank 1: out of memory: no room"):
            team.run(fails_on_rank_one, 60)
        with pytest.raises(TaskFailed, match=r"not done after 1 s on ranks \[0, 1\]"):
            team.run(rank_of, 1) and team.run(is_silent, 1)
        assert team.run(rank_of, 60) == [0, 1]


@pytest.mark.slow
def test_training_over_ranks_follows_one_rank(tmp_path):
    words = ["bench", "cp", "--device", "cpu", "--ranks", "2", "--tokens", "1024", "--only", "nothing"]
    assert main([*words, "--out", str(tmp_path)]) == exit_codes.OK
    rows = json.loads((tmp_path / "cp.json").read_text())["training"]
    assert [row.get("split") for row in rows[:2]] == ["TP 1 x CP 1 x DP 1", "TP 1 x CP 2 x DP 1"]
    assert rows[2]["largest_difference"] < 1e-6
    assert rows[2]["first_difference"] <= rows[2]["largest_difference"]
    assert rows[2]["wrong"] == ""
    assert len(rows[0]["losses"]) == 6  # after the step that both go on from


def test_losses_that_differ_fail_the_bench(tmp_path):
    assert judge([2.0, 1.0], [2.0 + 1e-6, 1.0 - 5e-5])["wrong"] == ""
    first, later = judge([2.0, 1.0], [2.0 + 1e-5, 1.0]), judge([2.0, 1.0], [2.0, 1.1])
    assert first["wrong"].startswith("the first step differs by 5.0e-06 of the loss, allowed are 1e-06")
    assert later["wrong"].startswith("a step differs by 1.0e-01")
    assert judge([float("nan"), 1.0], [2.0, 1.0])["wrong"]
    report = Report(tmp_path, machine("cpu", 1, "two ranks"))
    report.add("training", judge([2.0], [2.0]), "right")
    assert not report.failed()
    report.add("training", later, "wrong")
    assert report.failed()


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 16])
def test_a_split_uses_every_rank(ranks):
    split = Split.of(ranks)
    assert split.num_ranks == ranks
    assert (split.context > 1) == (ranks % 2 == 0)


# --- Words, pictures, mistakes --------------------------------------------------------------------------------------


def test_overlapping_transfers_get_lanes_of_their_own():
    def span(begin: float, end: float) -> Span:
        return Span("transfer", "x", "pages", "forward", 0, begin, end)

    assert [len(lane) for lane in timeline.lanes([span(0, 2), span(1, 3), span(2, 4), span(3.5, 5)])] == [2, 2]


def test_bench_alone_prints_its_help(capsys):
    assert main(["bench"]) == exit_codes.OK
    assert "cp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--head-groups", "1,0"], "pass 1 to move all of them at once"),
        (["--gpus", "all"], "take --ranks 2, whose ranks share one device over gloo"),
        (["--gpus", "2", "--ranks", "2"], "give one of them"),
        (["--ranks", "1"], "leave --ranks out to measure one rank of many"),
        (["--rank", "8"], "take --rank 0"),
        (["--ranks", "2", "--cluster", "nowhere.yaml"], "pass --cluster FILE"),
    ],
    ids=["no head group", "no GPUs", "both", "one rank", "no such rank", "no such cluster"],
)
def test_mistakes_are_refused_with_a_remedy(words, remedy, tmp_path, capsys):
    assert main(["bench", "cp", "--device", "cpu", "--out", str(tmp_path), *words]) == exit_codes.BAD_CONFIG
    assert remedy in capsys.readouterr().err
