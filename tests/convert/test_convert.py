"""A converted model has the dense model's logits, and what cannot be converted is refused."""

import json

import pytest
import torch

from dense_models import LLAMA, QWEN3, drawn, logits, write_folder
from nsa_dist import NSAConfig
from nsa_dist.convert.dense import read_dense
from nsa_dist.convert.nsa import converted
from nsa_dist.convert.write import write_dense
from nsa_dist.inference.folder import load_model, save_model

MODELS = {"llama": (LLAMA, 1), "qwen3": (QWEN3, 3)}


@pytest.mark.parametrize(("config", "files"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_logits_are_the_dense_ones_while_all_blocks_are_selected(tmp_path, config, files, compression):
    weights = drawn(config)
    dense = read_dense(write_folder(tmp_path / "dense", config, weights, files))
    save_model(converted(dense, NSAConfig(), compression=compression), tmp_path / "nsa")
    model, tokens = load_model(tmp_path / "nsa"), torch.arange(1024) * 37 % 251
    expected = logits(config, weights, tokens)
    assert expected.std() > 1
    torch.testing.assert_close(model(tokens).double(), expected, rtol=0, atol=1e-4)
    cache = model.make_cache(200)
    seq = cache.new_sequence()
    torch.testing.assert_close(model.prefill(tokens[:90], cache, [seq]).double(), expected[:90], rtol=0, atol=1e-4)
    (last,) = model.decode(tokens[None, 90:94], cache, [seq])
    torch.testing.assert_close(last.double(), expected[90:94], rtol=0, atol=1e-4)


def test_phi_begins_near_the_mean(tmp_path):
    dense = read_dense(write_folder(tmp_path / "dense", LLAMA, drawn(LLAMA)))
    layer = converted(dense, NSAConfig()).layers[0].attention
    blocks = torch.randn(50, 32, 2, 12)
    start = torch.zeros(50, dtype=torch.int64)  # where nothing is turned
    for phi in (layer.compress_k, layer.compress_v):
        torch.testing.assert_close(phi(blocks, start), blocks.mean(1), rtol=0.02, atol=0.01)


def test_sizes_are_those_of_the_folder(tmp_path):
    dense = read_dense(write_folder(tmp_path / "dense", LLAMA, drawn(LLAMA)))
    assert dense.not_read == ("initializer_range",)
    config = converted(dense, NSAConfig(window_len=64)).config
    assert (config.end_of_document, config.tokenizer, config.dtype) == (7, "huggingface", "fp32")
    assert config.nsa.window_len == 64
    assert (config.rope_scaling, config.gate_bias) == (LLAMA["rope_scaling"], True)


@pytest.mark.parametrize(("config", "files"), MODELS.values(), ids=MODELS)
def test_what_is_written_is_what_was_read(tmp_path, config, files):
    dense = read_dense(write_folder(tmp_path / "first", config, drawn(config), files))
    dense = dense._replace(tokenizer="bytes", sequence_length=4096)
    write_dense(dense, tmp_path / "second")
    again = read_dense(tmp_path / "second")
    for name in dense.weights:
        assert torch.equal(again.weights[name], dense.weights[name])
    assert again._replace(weights={}, not_read=()) == dense._replace(weights={}, not_read=())
    assert again.weights.keys() == dense.weights.keys()
    assert (tmp_path / "second/tokenizer.json").is_file()


WRONG = {
    "another kind": ({"model_type": "qwen2"}, r"model_type='qwen2'.*qwen2 has biases.*give a folder of one of these"),
    "biases": ({"attention_bias": True}, "attention_bias=True, but needs False.*give a folder of a model without it"),
    "windows": ({"layer_types": ["sliding_attention"]}, "all need to be full_attention"),
    "a size that is missing": ({"hidden_size": None}, "give a folder as Hugging Face has it"),
    "another scaling": ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "give one of them"),
    "other sizes": ({"vocab_size": 250}, r"has lm_head.weight \[256, 48\].*without biases"),
}


@pytest.mark.parametrize(("change", "remedy"), WRONG.values(), ids=WRONG)
def test_what_is_not_understood_is_refused(tmp_path, change, remedy):
    folder = write_folder(tmp_path / "dense", {**LLAMA, **change}, drawn(LLAMA))
    with pytest.raises(ValueError, match=remedy):
        read_dense(folder)


def test_files_that_are_missing_or_torn_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json cannot be read.*give a folder as Hugging Face has it"):
        read_dense(tmp_path)
    weights = drawn(LLAMA)
    extra = {**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}
    with pytest.raises(ValueError, match=r"q_proj.bias \[48\].*Qwen 2.5.*give a folder"):
        read_dense(write_folder(tmp_path / "biased", LLAMA, extra))
    folder = write_folder(tmp_path / "dense", LLAMA, weights, files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / index["model.norm.weight"]).unlink()
    with pytest.raises(ValueError, match=r"has no model-\d.safetensors.*download the folder as a whole"):
        read_dense(folder)
