"""An exported folder in `transformers`: the same tokens, padding that changes nothing, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa_dist import NSAConfig
from nsa_dist.inference.folder import load_model, save_model
from nsa_dist.inference.generate import Sampling, generate
from nsa_dist.inference.model import GPT, GPTConfig

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed: pip install '.[hf]'")
door = pytest.importorskip("nsa_dist.inference.huggingface")

CONFIG = GPTConfig(
    2, 32, 4, 2, 8, 48, NSAConfig(8, 4, 16, 4, 1, 2, 20), rotary_base=100.0, tie_embeddings=False, sequence_length=128
)
EXAMPLE = Path(__file__).parents[2] / "examples/in_transformers.py"
PROMPTS = ["def main(", "x = 1", "h\u00e9llo " * 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose likeliest tokens vary, and end no document."""
    torch.manual_seed(0)
    model, folder = GPT(CONFIG), tmp_path_factory.mktemp("exported") / "model"
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.mul_(4 if any(word in name for word in ("output", "proj", "down")) else 1)
        model.output.weight[0] = 0
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def ours(plain: GPT, prompt: str, count: int) -> list[int]:
    return [piece.token for piece in generate(plain, [prompt.encode()], count, Sampling(0.0))]


def test_the_tokenizer_is_bytes(tokenizer):
    for text in (*PROMPTS, "a\0b \u0100 \U0001f600"):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 0, 256)


def test_greedy_generation_is_ours(model, plain, tokenizer):
    """Alone, and in a batch that is padded on the left."""
    expected = [ours(plain, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == 3
    assert len(set(expected[0])) > 3
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        found = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)
        assert found[0, len(prompt.encode()) :].tolist() == tokens
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert batch["attention_mask"].sum() < batch["input_ids"].numel()
    found = model.generate(**batch, max_new_tokens=20, do_sample=False)
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_share_the_cache(model, tokenizer, options):
    """Rows that are taken up by several beams are forks: what is found is what is found without a cache."""
    batch = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    shared = {"max_new_tokens": 25, "do_sample": False, **options}
    assert torch.equal(model.generate(**batch, **shared), model.generate(**batch, **shared, use_cache=False))


def test_a_document_ends(model, plain, tokenizer):
    """A row that has ended is padded, and the others go on as if alone."""
    expected = [ours(plain, prompt, 20) for prompt in PROMPTS[:2]]
    end = next(token for token in expected[0][2:] if token not in expected[0][:2] and token not in expected[1])
    stop = expected[0].index(end)
    batch = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    found = model.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=end)
    assert found[0, -20:].tolist() == [*expected[0][: stop + 1], *[0] * (19 - stop)]
    assert found[1, -20:].tolist() == expected[1]
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (0, 0)


def test_loglikelihoods_with_padding_on_the_right(model, plain, tokenizer):
    """As evaluation harnesses ask for them: a forward of padded rows, log-probabilities of a text's own tokens."""
    tokenizer.padding_side = "right"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    tokenizer.padding_side = "left"
    with torch.no_grad():
        logits = model(**batch).logits
        loss = model(**batch, labels=batch["input_ids"]).loss
    losses = []
    for row, prompt in zip(logits, PROMPTS, strict=True):
        tokens = torch.tensor(list(prompt.encode()))
        expected = plain(tokens)
        torch.testing.assert_close(row[: len(tokens)], expected, rtol=1e-5, atol=1e-5)
        assert not row[len(tokens) :].any()
        losses.append(torch.nn.functional.cross_entropy(expected[:-1], tokens[1:], reduction="none"))
    assert loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert torch.equal(
        model(batch["input_ids"][:1, :5], logits_to_keep=2).logits, model(batch["input_ids"][:1, :5]).logits[:, -2:]
    )


def test_a_cache_is_appended_to_and_taken_back(model):
    tokens = torch.tensor([list(b"a text of some tokens, forty of them now.")])
    expected = model(tokens).logits
    cache = model.new_cache(1, 64)
    first = model(tokens[:, :20], cache=cache).logits
    wrong = model(tokens[:, :4] + 1, cache=cache).logits
    assert (cache.get_seq_length(), wrong.shape[1]) == (24, 4)
    cache.crop(4)
    rest = [
        model(tokens[:, start:stop], cache=cache).logits for start, stop in ((20, 25), (25, 26), (26, tokens.shape[1]))
    ]
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, rtol=1e-4, atol=1e-5)
    cache.reset()
    torch.testing.assert_close(model(tokens, cache=cache).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_it_writes_torch_alone_reads(model, plain, tmp_path):
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config == plain.config
    assert all(torch.equal(x, y) for x, y in zip(plain.parameters(), again.parameters(), strict=True))
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half").config.dtype == "bf16"
    assert json.loads((tmp_path / "half/config.json").read_text())["model_type"] == "nsa_gpt"


def test_the_example_runs(folder):
    done = subprocess.run([sys.executable, EXAMPLE, folder, *PROMPTS[:2]], capture_output=True, text=True, check=True)
    assert done.stdout.count("--- loss of the prompt ") == 2
    assert all(f"---\n{prompt}" in done.stdout for prompt in PROMPTS[:2])


def test_refusals(model, folder, tokenizer):
    tokens, loaded = torch.tensor([[1, 2, 3]]), transformers.AutoModelForCausalLM.from_pretrained
    cache, other = model.new_cache(1, 16), transformers.DynamicCache()
    for call, match in [
        (lambda: model(tokens, output_attentions=True), "output_attentions was given.*leave it out"),
        (lambda: model(inputs_embeds=torch.zeros(1, 3, 32)), "inputs_embeds was given"),
        (lambda: model(tokens, use_cache=True), r"pass cache=model.new_cache\(batch_size, max_tokens\)"),
        (lambda: model(tokens, cache=other), "DynamicCache, which holds dense"),
        (lambda: model(tokens.repeat(2, 1), cache=cache), "pass a cache of new_cache"),
        (lambda: model(tokens, attention_mask=torch.ones(1, 1, 3, 3)), "pass the tokenizer's"),
        (lambda: model(tokens, position_ids=torch.tensor([[1, 2, 3]])), "leave position_ids out"),
        (lambda: model.generate(tokens, cache_implementation="static"), "leave it out"),
        (lambda: model.resize_token_embeddings(300), "train a run with the vocabulary"),
        (lambda: cache.crop(9), "num_assistant_tokens"),
        (lambda: loaded(folder, dtype=torch.float16), "load an exported folder"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
