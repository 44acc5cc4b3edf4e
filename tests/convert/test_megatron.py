"""A dense GPT of Megatron-core's own layers, saved as Megatron-LM saves it, converts to its own logits."""

import pytest
import torch

from megatron_checkpoints import ARGUMENTS, BY_THEMSELVES, LAYOUTS, VARIANTS, everything, tokens, two_ranks
from nsa_dist import NSAConfig
from nsa_dist.convert.megatron.weights import read_megatron
from nsa_dist.convert.nsa import converted
from nsa_dist.inference.folder import load_model, save_model
from ranks import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    return folder, run_ranks(1, everything, folder)[0]


@pytest.mark.parametrize("name", [*VARIANTS, BY_THEMSELVES])
def test_logits_are_the_dense_ones_while_all_blocks_are_selected(saved, tmp_path, name):
    folder, logits = saved
    dense = read_megatron(folder / name, "bytes", 0)
    save_model(converted(dense, NSAConfig()), tmp_path / "nsa")
    assert logits[name].std() > 0.9
    torch.testing.assert_close(load_model(tmp_path / "nsa")(tokens()).double(), logits[name], rtol=0, atol=1e-4)
    assert "state of the optimizer" in dense.not_read


@pytest.mark.slow
def test_a_checkpoint_of_any_layout_is_the_same_model(saved):
    folder, _ = saved
    run_ranks(2, two_ranks, folder)
    one, *others = (read_megatron(folder / name / "iter_0000003", "bytes", 0) for name in ("like Llama", *LAYOUTS))
    for other in others:
        assert one.weights.keys() == other.weights.keys()
        for name in one.weights:
            assert torch.equal(one.weights[name], other.weights[name]), name


def test_sizes_are_those_of_the_arguments(saved):
    dense = read_megatron(saved[0] / "like Llama", "huggingface", 7)
    assert (dense.num_kv_heads, dense.vocab_size, dense.rotary_base, dense.norm_eps) == (2, 256, 50_000.0, 1e-5)
    assert (dense.tokenizer, dense.end_of_document, dense.dtype) == ("huggingface", 7, "fp32")
    assert dense.sequence_length == ARGUMENTS["seq_length"]
    assert read_megatron(saved[0] / "norms around one, no groups, positions stretched", "bytes", 0).num_kv_heads == 4
