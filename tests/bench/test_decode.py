"""`nsa-dist bench decode`, for the most part without a GPU: what it counts, writes, and says of wrong results."""

import json
from types import SimpleNamespace

import pytest
import torch

from nsa_dist import NSAConfig
from nsa_dist.bench.decode import measure, over_ranks, run
from nsa_dist.bench.decode.case import DecodeCase
from nsa_dist.bench.decode.layer import Layer
from nsa_dist.bench.decode.over_ranks import DecodeOverRanks
from nsa_launch import exit_codes
from nsa_launch.cli import main
from thread_ranks import run_threads

ON_A_CPU = ["bench", "decode", "--device", "cpu", "--batch", "1,2", "--tokens", "90", "--heads", "2,1,16,16"]


def test_bytes():
    """200 tokens and a new one: 11 compressed rows, 2 whole blocks and 9 tokens of the third one's own, 100 of the
    window; a token takes 3 * (16 + 8) * 2 bytes."""
    case = DecodeCase(2, 200, (6, 3, 16, 8), cfg=NSAConfig(num_slc_blocks=3, window_len=100))
    assert case.nsa_bytes == 2 * (11 + 2 * 64 + 9 + 100) * 144
    assert case.dense_bytes == 2 * 201 * 144
    whole = DecodeCase(64, 65536)
    assert whole.dense_bytes / whole.nsa_bytes == pytest.approx(11.6, abs=0.2)


def test_bytes_of_pages_in_fp8():
    """As above, but for the window."""
    case = DecodeCase(2, 200, (6, 3, 16, 8), cfg=NSAConfig(num_slc_blocks=3, window_len=100), fp8=True)
    assert case.nsa_bytes == 2 * ((11 + 2 * 64 + 9) * 72 + 100 * 144)


def test_how_far_fp8_is_is_counted(tmp_path, capsys):
    assert main([*ON_A_CPU, "--out", str(tmp_path), "--only", "batch 2", "--fp8"]) == exit_codes.OK
    (row,) = json.loads((tmp_path / "decode.json").read_text())["cases"]
    assert row["case"] == "batch 2, 90, fp8"
    assert row["wrong"] is None
    assert 1e-3 < row["fp8_error"] < 0.1
    assert 1e-3 < row["fp8_error_same_blocks"] < 0.1
    assert 0 <= row["fp8_other_blocks"] <= row["fp8_blocks"] == 2 * 2
    assert "from wide pages" in capsys.readouterr().out


def test_the_layer_holds_what_the_case_says():
    layer = Layer.of(DecodeCase(2, 90, (2, 1, 16, 16), "fp32"), torch.device("cpu"))
    layer.call()
    assert [layer.cache.length(seq) for seq in layer.seqs] == [90, 90]
    pages = torch.cat([layer.cache.state(seq).pages for seq in layer.seqs])
    assert len(pages.unique()) == len(pages) == 2 * layer.case.pages


def test_checked_and_called(tmp_path, capsys):
    assert main([*ON_A_CPU, "--out", str(tmp_path)]) == exit_codes.OK
    cases = json.loads((tmp_path / "decode.json").read_text())["cases"]
    assert [row["case"] for row in cases] == ["batch 1, 90", "batch 2, 90"]
    assert all(row["wrong"] is None and row["call_s"] > 0 for row in cases)
    assert (tmp_path / "decode.txt").read_text() == capsys.readouterr().out


def test_a_wrong_result_gets_no_time(tmp_path, monkeypatch):
    expected = Layer.expected
    monkeypatch.setattr(Layer, "expected", lambda *a: (1.1 * expected(*a)[0], expected(*a)[1]))
    assert main([*ON_A_CPU, "--out", str(tmp_path), "--only", "batch 2"]) == exit_codes.FAILED
    (row,) = json.loads((tmp_path / "decode.json").read_text())["cases"]
    assert "differs by" in row["wrong"]
    assert "call_s" not in row


def test_what_does_not_fit_is_left_out(tmp_path):
    request = run.DecodeRequest(tmp_path, "cpu", (1,), (90,), (2, 1, 16, 16), budget_s=0.0)
    assert run.run(request) is False
    (left_out,) = json.loads((tmp_path / "decode.json").read_text())["not_run"]
    assert left_out["what"] == "batch 1, 90"


def over_two(comm, placement=None, **options):
    place = SimpleNamespace(num_ranks=comm.size)
    world = SimpleNamespace(place=place, device=torch.device("cpu"), comm=lambda _: comm)
    return DecodeOverRanks(DecodeCase(2, 300, (2, 1, 16, 16), "fp32", **options), placement)(world)


@pytest.mark.parametrize(
    ("placement", "options", "found", "exchanges"),
    [
        ("sharded", {}, "sharded", 3),
        ("replicated", {}, "replicated", 1),
        (None, {"fp8": True}, "replicated", 1),
    ],
)
def test_over_ranks_it_is_one_ranks(placement, options, found, exchanges):
    for row in run_threads(2, lambda comm: over_two(comm, placement, **options)):
        assert row["wrong"] is None
        assert (row["cmp_placement"], row["exchanges"]) == (found, exchanges)
        assert row["error"] < 1e-5
        assert (row["other_blocks"], row["rows"]) == (0, 2)
        assert row["call_s"] > 0


def test_over_ranks_what_differs_is_wrong(monkeypatch):
    """A rank whose pages have other keys."""
    copy = over_ranks._copy

    def damaged(cache, from_pages, from_ring, storage, pages, ring):
        copy(cache, from_pages, from_ring, storage, pages, ring)
        if storage.cp_rank == 1:
            storage.slc.v.mul_(2)

    monkeypatch.setattr(over_ranks, "_copy", damaged)
    assert all("differs by" in row["wrong"] for row in run_threads(2, over_two))


@pytest.mark.slow
def test_over_processes(tmp_path, capsys):
    assert main([*ON_A_CPU, "--ranks", "2", "--out", str(tmp_path)]) == exit_codes.OK
    cases = json.loads((tmp_path / "decode-ranks.json").read_text())["cases"]
    assert [(row["case"], row["cmp_placement"]) for row in cases] == [
        (case, placement) for case in ("batch 1, 90", "batch 2, 90") for placement in ("replicated", "sharded")
    ]
    assert all(len(row["ranks"]) == 2 and row["call_s"] > 0 for row in cases)
    assert (tmp_path / "decode-ranks.txt").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--heads", "4,2,16"], "give for example"),
        (["--batch", "0"], "give for example"),
        (["--device", "cuda"], "cpu"),
        (["--ranks", "1"], "leave --ranks out"),
        (["--cmp-placement", "sharded"], "leave it out, or give --gpus all"),
        (["--ranks", "2", "--cmp-placement", "sharded", "--fp8"], "leave one of them out"),
    ],
)
def test_refusals(words, remedy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "decode", "--out", str(tmp_path), *words]) == exit_codes.BAD_CONFIG
    assert remedy in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_is_timed():
    row = measure.measure(DecodeCase(2, 4096), torch.device("cuda"), measure.Clock(3))
    assert row["launches"] == 3
    assert 0 < row["floor_s"] < row["graph_s"]
