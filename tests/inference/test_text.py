"""Texts to tokens and back as they stream, and tokenizers that travel with an exported model."""

import json
import random

import pytest
import torch

from nsa_dist import NSAConfig
from nsa_dist.inference.folder import load_model, save_model
from nsa_dist.inference.model import GPT, GPTConfig
from nsa_dist.inference.text import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    ByteText,
    FolderText,
    byte_tokenizer_files,
    tokenizer_of,
)
from nsa_launch import cli, exit_codes

TEXTS = [
    "h\u00e9llo  wor\u0142d",
    "\u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469!",
    " a\n\tb \u0100 </s>",
    "x",
]


def tokenizers_of(kind: str, folder):
    """A tokenizer folder of `kind`, whose pieces cut characters and drop spaces at the beginning."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `tokens` is not installed")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if kind == "byte-level":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
        alphabet = []
    specials = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["hello hello world, a b"] * 9, trainer)
    folder.mkdir()
    made.save(str(folder / TOKENIZER))
    return folder


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "byte-level", "metaspace"])
def test_what_streams_is_the_text(kind, text, tmp_path):
    """Behind every prompt that is whole characters: none is cut, no space lost, nothing said twice."""
    tokenizer = ByteText() if kind == "bytes" else FolderText(tokenizers_of(kind, tmp_path / "t"))

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace") if kind == "bytes" else tokenizer._model.decode(tokens)

    tokens = tokenizer.encode(text)
    cuts = [cut for cut in range(len(tokens) + 1) if "\ufffd" not in decode(tokens[:cut])]
    assert len(cuts) > 1
    for cut in cuts:
        stream = tokenizer.stream(tokens[:cut])
        said = [stream.add(token) for token in tokens[cut:]]
        assert all("\ufffd" not in piece for piece in said)
        assert "".join(said) + stream.rest() == decode(tokens)[len(decode(tokens[:cut])) :]


def test_bytes_are_those_of_the_package(tmp_path):
    """The files that an exported model of bytes has, read by `tokenizers`: token i is byte i, both ways."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `tokens` is not installed")
    model = tokenizers.Tokenizer.from_str(byte_tokenizer_files()[TOKENIZER])
    rng = random.Random(0)
    texts = [
        *TEXTS,
        "".join(chr(rng.choice([rng.randrange(1, 0x300), rng.randrange(0xE000, 0x11000)])) for _ in range(400)),
    ]
    for text in texts:
        tokens = model.encode(text).ids
        assert tokens == list(text.encode())
        assert model.decode(tokens) == text
    assert model.encode("a\0b").ids == [97, 0, 98]
    assert model.get_vocab_size() == 256
    assert json.loads(byte_tokenizer_files()[TOKENIZER_CONFIG])["eos_token"] == "\0"


def test_a_folder_without_its_tokenizer_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="export the run again with --tokenizer DIR"):
        tokenizer_of("huggingface", tmp_path)
    (tmp_path / TOKENIZER).write_text("{}")
    pytest.importorskip("tokenizers", reason="the extra `tokens` is not installed")
    with pytest.raises(ValueError, match="put it back from where it was copied"):
        tokenizer_of("huggingface", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'nsa-dist\[tokens\]'"):
        tokenizer_of("huggingface", tmp_path)


def test_the_command_speaks_the_words_of_an_exported_tokenizer(tmp_path, capsys):
    folder = tokenizers_of("byte-level", tmp_path / "t")
    torch.manual_seed(0)
    sizes = GPTConfig(1, 32, 4, 2, 8, 48, NSAConfig(8, 4, 16, 4, 1, 2, 20), vocab_size=640, tokenizer="huggingface")
    files = {TOKENIZER: (folder / TOKENIZER).read_bytes()}
    save_model(GPT(sizes), tmp_path / "m", files)
    assert load_model(tmp_path / "m").config == sizes
    words = ["generate", str(tmp_path / "m"), "--prompt", "hello w\u00f6rld", "--max-new-tokens", "9"]
    assert cli.main(words) == exit_codes.OK
    said = capsys.readouterr()
    assert said.out.startswith("hello w\u00f6rld")
    assert "9 tokens in " in said.err
    assert cli.main([*words, "--tokenizer", str(folder)]) == exit_codes.BAD_CONFIG
    assert "a tokenizer of its own" in capsys.readouterr().err
