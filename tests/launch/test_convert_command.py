"""`nsa-dist convert`: what it takes, and the tokenizer that goes with the model."""

import json

import pytest

from dense_models import LLAMA, drawn, write_folder
from megatron_checkpoints import write_without_megatron
from nsa_launch import cli, exit_codes


@pytest.fixture
def convert(tmp_path, capsys):
    """Its exit code, what it says, and what config.json is written."""

    def called(folder, *words: str) -> tuple[int, str, dict]:
        code = cli.main(["convert", str(folder), "--to", str(tmp_path / "to"), *words])
        said, config = capsys.readouterr(), tmp_path / "to/config.json"
        return code, said.out + said.err, json.loads(config.read_text()) if config.is_file() else {}

    return called


@pytest.fixture
def tokenizer(tmp_path):
    """A folder of 251 tokens, of which `</s>` ends a text."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `tokens` is not installed")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"</s>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, 251)}}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def test_a_checkpoint_of_megatron_needs_a_tokenizer(tmp_path, convert):
    folder = write_without_megatron(tmp_path / "dense")
    code, said, _ = convert(folder)
    assert code == exit_codes.BAD_CONFIG
    assert "no --tokenizer was given" in said
    assert "give --tokenizer DIR, a folder with tokenizer.json, or --tokenizer bytes" in said
    code, said, config = convert(folder, "--tokenizer", "bytes")
    assert code == exit_codes.OK, said
    assert (config["tokenizer"], config["end_of_document"], config["vocab_size"]) == ("bytes", 0, 256)
    assert f"not read of {folder}: state of the optimizer" in said
    assert (tmp_path / "to/tokenizer.json").is_file()


def test_a_tokenizer_is_copied_and_says_what_ends_a_text(tmp_path, convert, tokenizer):
    folder = write_without_megatron(tmp_path / "dense")
    code, said, config = convert(folder, "--tokenizer", str(tokenizer), "--end-of-document", "<end>")
    assert code == exit_codes.OK, said
    assert (config["tokenizer"], config["end_of_document"]) == ("huggingface", 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "to" / name).read_bytes() == (tokenizer / name).read_bytes()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, convert, tokenizer):
    folder = write_without_megatron(tmp_path / "dense", {"padded_vocab_size": 128})
    code, said, _ = convert(folder, "--tokenizer", str(tokenizer))
    assert code == exit_codes.BAD_CONFIG
    assert "has 251 tokens, and the model 128 rows" in said
    assert "give the one that the model was trained with" in said
    code, said, _ = convert(folder, "--end-of-document", "<end>")
    assert code == exit_codes.BAD_CONFIG
    assert "without --tokenizer, whose token it is; give --tokenizer DIR" in said


def test_the_tokenizer_of_a_folder_of_hugging_faces_goes_with_its_model(tmp_path, convert, tokenizer):
    folder = write_folder(tmp_path / "dense", LLAMA, drawn(LLAMA))
    (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    code, said, config = convert(folder)
    assert code == exit_codes.OK, said
    assert (config["tokenizer"], config["end_of_document"]) == ("huggingface", 7)
    assert (tmp_path / "to/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
