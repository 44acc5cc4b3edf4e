"""Dense layers: their values, their twins' weights, tensor-parallel ranks, and patterns of both kinds."""

import pytest

from mcore_cases import make_config
from mcore_dense_cases import PROMISES, WORLD, everything
from nsa_dist.config import layer_attentions
from nsa_dist.mcore import DenseSelfAttention, NSASelfAttention, nsa_block_spec, nsa_layer_spec
from ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(WORLD, everything, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.parametrize("name", PROMISES)
def test_promise(results, name):
    for rank, by_name in enumerate(results):
        assert not by_name[name], f"rank {rank}: {by_name[name]}"


@pytest.mark.parametrize(
    ("pattern", "num_layers", "expected"),
    [
        ("dense", 2, ("dense", "dense")),
        (["nsa", "nsa", "dense"], 6, ("nsa", "nsa", "dense", "nsa", "nsa", "dense")),
        (("nsa", "dense"), 2, ("nsa", "dense")),
    ],
)
def test_a_pattern_repeats_until_the_layers_end(pattern, num_layers, expected):
    assert layer_attentions(pattern, num_layers) == expected


def test_a_block_has_the_layers_of_its_pattern(monkeypatch):
    pattern = ["nsa", "nsa", "dense", "nsa", "dense", "nsa"]
    config = make_config(num_layers=6, nsa_attention=pattern)
    monkeypatch.setattr("nsa_dist.mcore.specs.get_transformer_layer_offset", lambda config, vp_stage: 2)
    monkeypatch.setattr("nsa_dist.mcore.specs.get_num_layers_to_build", lambda config, vp_stage: 3)
    modules = [layer.submodules.self_attention.module for layer in nsa_block_spec(config).layer_specs]
    assert modules == [DenseSelfAttention, NSASelfAttention, DenseSelfAttention]
    plans = {id(layer.submodules.self_attention.params["plans"]) for layer in nsa_block_spec(config).layer_specs}
    assert len(plans) == 1, "the plan of a batch is worked out once"


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"nsa_attention": "sparse"}, r"must be one of nsa, dense.*give \[nsa, nsa, nsa, dense\]"),
        ({"nsa_attention": []}, "must be one of nsa, dense"),
        ({"nsa_attention": ["nsa", "dense"], "num_layers": 3}, "take num_layers=4"),
        ({"nsa_attention": "dense", "context_parallel_size": 2}, "set context_parallel_size=1, or nsa_attention='nsa'"),
    ],
)
def test_the_config_names_the_remedy(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        make_config(**changes)


def test_one_layer_has_no_pattern():
    config = make_config(num_layers=2, nsa_attention=["nsa", "dense"])
    with pytest.raises(ValueError, match=r"pass nsa_block_spec\(config\) to the model"):
        nsa_layer_spec(config)
    dense = nsa_layer_spec(make_config(nsa_attention="dense"))
    assert dense.submodules.self_attention.module is DenseSelfAttention
