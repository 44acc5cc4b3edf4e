"""`nsa-dist bench generate` without a GPU: both sides agree with whole sequences, and what does not gets no time."""

import json

import pytest
import torch

from nsa_dist.bench.generate.dense import DenseTwin
from nsa_dist.bench.generate.measure import Bench
from nsa_dist.config import NSAConfig
from nsa_dist.inference.folder import save_model
from nsa_dist.inference.model import GPT, GPTConfig
from nsa_launch import exit_codes
from nsa_launch.cli import main

ON_A_CPU = ["bench", "generate", "--device", "cpu", "--new", "3"]


def model(**changes) -> GPT:
    """In fp64, all blocks selected: the dense twin's attention is then the selected branch's."""
    torch.manual_seed(0)
    config = GPTConfig(2, 32, 4, 2, 8, 48, NSAConfig(num_slc_blocks=4), **changes)
    return GPT(config).requires_grad_(False).double()


@pytest.mark.parametrize(
    "changes", [{}, {"shared_kv": True}, {"qk_norm": "rms", "v_head_dim": 16}, {"rotary_percent": 0.5}]
)
def test_the_dense_twin_attends_to_all_keys_of_the_selected_branch(changes):
    """Against the model itself with its gates open for that branch alone, while all blocks are selected."""
    gpt, tokens = model(**changes), torch.randint(0, 256, (2, 200))
    twin = DenseTwin(gpt, 2, 200)
    for block in gpt.layers:
        project = block.attention.project

        def gated(x, position, project=project):
            q, kv, gates = project(x, position)
            return q, kv, torch.tensor([0.0, 1.0, 0.0], dtype=gates.dtype).expand_as(gates)

        block.attention.project = gated
    expected = gpt(tokens)
    for slot in range(2):
        found = twin.prefill(tokens[slot, :190], slot, rows=range(190))
        torch.testing.assert_close(found, expected[slot, :190], rtol=0, atol=1e-10)
    for length in range(190, 200):
        found = twin.step(tokens[:, length : length + 1], length)
        torch.testing.assert_close(found[:, 0], expected[:, length], rtol=0, atol=1e-10)


def test_drawn_weights_are_checked_and_timed(tmp_path, capsys):
    words = ["--tokens", "90", "--sizes", "1,32,2,1,16,48"]
    assert main([*ON_A_CPU, *words, "--out", str(tmp_path)]) == exit_codes.OK
    one, two = json.loads((tmp_path / "generate.json").read_text())["cases"]
    for row in (one, two):
        assert row["wrong"] is None
        assert max(row["errors"].values()) < 1e-5
        assert min(row["tokens_per_s"], row["dense_tokens_per_s"]) > 0
        assert row["dense_refused"] == {}
    assert min(one[name] for name in ("prefill_s", "prefill_whole_s", "layer_prefill_s", "dense_prefill_s")) > 0
    assert "prefill_s" not in two
    assert (tmp_path / "generate.txt").read_text() == capsys.readouterr().out


def test_an_exported_model_is_read(tmp_path):
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(1, 32, 2, 1, 16, 48, NSAConfig())), tmp_path / "model")
    words = ["--tokens", "70", "--batch", "1", "--model", str(tmp_path / "model"), "--out", str(tmp_path)]
    assert main([*ON_A_CPU, *words]) == exit_codes.OK
    data = json.loads((tmp_path / "generate.json").read_text())
    assert data["model"]["num_q_heads"] == 2


@pytest.mark.parametrize("side", ["_nsa_error", "_dense_error"])
def test_a_wrong_result_gets_no_time(side, tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, side, lambda self: 0.3)
    words = ["--tokens", "70", "--batch", "1", "--sizes", "1,32,2,1,16,48", "--out", str(tmp_path)]
    assert main([*ON_A_CPU, *words]) == exit_codes.FAILED
    (row,) = json.loads((tmp_path / "generate.json").read_text())["cases"]
    assert "differ by 3.0e-01" in row["wrong"]
    assert "step_s" not in row


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--new", "0"], "--new 64"),
        (["--sizes", "1,2,3"], "give for example --sizes"),
        (["--sizes", "1,32,2,1,16,48", "--model", "x"], "which has sizes of its own"),
        (["--model", "nowhere"], "nsa-dist export RUN --to nowhere"),
        (["--device", "cuda"], "--device cpu"),
    ],
)
def test_refusals(words, remedy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "generate", "--out", str(tmp_path), *words]) == exit_codes.BAD_CONFIG
    assert remedy in capsys.readouterr().err
