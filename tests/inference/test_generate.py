"""Generation: the cache's tokens are those of the whole forward, and what is drawn depends on its prompt alone."""

import io
import os
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from nsa_dist import NSAConfig
from nsa_dist.inference.folder import save_model
from nsa_dist.inference.generate import Sampling, draw, generate
from nsa_dist.inference.model import GPT, GPTConfig
from nsa_dist.inference.tensors import read_tensors, write_tensors
from nsa_dist.inference.text import ByteText
from nsa_launch import cli, exit_codes
from nsa_launch.commands import generate as command

CONFIG = GPTConfig(2, 32, 4, 2, 8, 48, NSAConfig(8, 4, 16, 4, 1, 2, 20), rotary_base=100.0)
ROOT = Path(__file__).parents[2]
PROMPTS = [b"def main(", b"", b"x" * 70, "h\u00e9".encode()]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        model.embedding.weight.mul_(0.3)
    return model.requires_grad_(False).eval()


def tokens_of(model: GPT, prompts, count: int, sampling: Sampling) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for prompt, token in generate(model, prompts, count, sampling):
        found[prompt].append(token)
    return found


def test_the_likeliest_tokens_are_those_of_the_whole_forward(model):
    for prompt, found in zip(PROMPTS, tokens_of(model, PROMPTS, 9, Sampling(0.0)), strict=True):
        tokens = list(prompt) or [0]
        for token in found:
            assert int(model(torch.tensor(tokens))[-1].argmax()) == token
            tokens.append(token)


def test_what_is_drawn_does_not_depend_on_company(model):
    together = tokens_of(model, PROMPTS, 12, Sampling(1.0, 0.9, seed=5))
    assert together[0] == tokens_of(model, PROMPTS[:1], 12, Sampling(1.0, 0.9, seed=5))[0]
    assert together[0] != tokens_of(model, PROMPTS[:1], 12, Sampling(1.0, 0.9, seed=6))[0]
    assert all(0 not in tokens for tokens in together)


def test_top_p_takes_the_fewest_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in [(0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]:
        assert {draw(logits, Sampling(1.0, top_p), generator) for _ in range(300)} == kept
    assert draw(logits, Sampling(0.0), generator) == 0


def test_a_document_ends(model):
    """The end of a document ends its prompt alone, and is not given."""
    weight = model.embedding.weight
    before = weight.clone()
    weight[0] = 0
    free = tokens_of(model, PROMPTS, 12, Sampling(0.0))
    model.config.__dict__["end_of_document"] = free[0][5]
    try:
        found = tokens_of(model, PROMPTS, 12, Sampling(0.0))
    finally:
        model.config.__dict__["end_of_document"] = 0
        weight.copy_(before)
    assert found[0] == free[0][: free[0].index(free[0][5])]


@pytest.mark.parametrize(("prompts", "count", "sampling", "match"), [
    ([[256]], 1, Sampling(), "vocabulary is 0 to 255"), ([[1]], 0, Sampling(), "ask for some"),
    ([[1]], 1, Sampling(-1.0), "take temperature=0"), ([[1]], 1, Sampling(1.0, 0.0), "top_p=0.0 above 0"),
])  # fmt: skip
def test_refusals(model, prompts, count, sampling, match):
    with pytest.raises(ValueError, match=match):
        list(generate(model, prompts, count, sampling))


def test_the_command_writes_every_prompt(model, tmp_path, capsys):
    save_model(model, tmp_path)
    words = ["generate", str(tmp_path), "--prompt", "ab", "--prompt", "cd", "--max-new-tokens", "7", "--seed", "3"]
    assert cli.main(words) == exit_codes.OK
    said = capsys.readouterr()
    assert said.out.startswith("--- 1 of 2 ---\nab")
    assert "\n--- 2 of 2 ---\ncd" in said.out
    assert "14 tokens in " in said.err
    assert "tokens/s" in said.err
    assert cli.main(words) == exit_codes.OK
    assert capsys.readouterr().out == said.out


def test_the_command_refuses(model, tmp_path, capsys):
    save_model(model, tmp_path / "model")
    for words, match in [
        ([str(tmp_path)], "neither config.json nor run.json"), ([str(tmp_path / "model"), "--top-p", "2"], "at most 1"),
        ([str(tmp_path / "model"), "--device", "tape"], "no device"),
        ([str(tmp_path / "model"), "--max-new-tokens", "0"], "ask for some"),
    ]:  # fmt: skip
        assert cli.main(["generate", *words]) == exit_codes.BAD_CONFIG
        assert match in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "no"), "--to", str(tmp_path / "model")]) == exit_codes.BAD_CONFIG
    assert "nothing is overwritten" in capsys.readouterr().err


def test_characters_of_several_bytes_come_whole():
    out = io.StringIO()
    pieces = [command.Piece(0, byte) for byte in "\u00e9!".encode()] + [command.Piece(0, 0xE2)]
    assert command._show(["h"], [ByteText().stream(b"h")], pieces, out) == 4
    assert out.getvalue() == "h\u00e9!\ufffd\n"


def test_tensors_come_back(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).to(torch.bfloat16), "b": torch.arange(5), "empty": torch.empty(0, 3),
        "bool": torch.tensor([True]), "scalar": torch.tensor(2.5, dtype=torch.float64),
        "strided": torch.randn(4, 6).t(),
    }  # fmt: skip
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    found = read_tensors(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in tensors.items())
    size = struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])[0]
    assert size % 8 == 0


@pytest.mark.parametrize(("words", "writes"), [
    ([], True), (["ARGS=run.steps=2"], True), (["SAMPLE="], False), (["ARGS=output_dir=elsewhere"], False),
    (["CONFIG=configs/long-1m.yaml"], False),
])  # fmt: skip
def test_make_train_ends_with_a_text_of_its_own_run(words, writes):
    """Read from what make would do: one folder, in both commands; none where another model or folder is asked for."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    told = subprocess.run(
        ["make", "-n", "train", *words], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout.replace("\\\n", "")
    line = next(line for line in told.splitlines() if "nsa-dist train" in line)
    assert ("&& .venv/bin/nsa-dist generate $folder" in " ".join(line.split())) == writes
    assert line.count("folder=") == 1
