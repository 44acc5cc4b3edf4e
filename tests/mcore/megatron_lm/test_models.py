"""The models of the door to Megatron-LM, without it; tests/mcore/test_models.py builds some on ranks."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_cases import make_config
from nsa_dist.mcore import megatron_lm, nsa_block_spec
from nsa_dist.mcore.megatron_lm.models import GPTBuilder, stage_spec
from nsa_dist.mcore.norm import RMSNorm


def test_a_stage_of_the_container_is_the_block_of_its_configuration(monkeypatch):
    config = make_config(
        num_layers=4, pipeline_model_parallel_size=2, pipeline_dtype="unused", transformer_impl="local"
    )
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    spec = stage_spec(SimpleNamespace(transformer=config), vp_stage=None)
    assert len(spec.layer_specs) == 2
    assert spec.layer_norm is RMSNorm


def test_its_builder_predicts_further_tokens_by_nsa_layers(monkeypatch):
    """Megatron-LM's own builder would take dense layers for that."""

    class Stock:
        def __init__(self, model_config):
            self.model_config = model_config

        def build_model(self, **arguments):
            return gpt.mtp_block_spec(self.model_config, None, vp_stage=None)

    gpt = ModuleType("megatron.training.models.gpt")
    gpt.GPTModelBuilder, gpt.mtp_block_spec = Stock, "dense"
    models = ModuleType("megatron.training.models")
    models.gpt = gpt
    for module in (ModuleType("megatron.training"), models, gpt):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    config = make_config(transformer_impl="local")
    assert GPTBuilder(SimpleNamespace(transformer=config)).build_model() is None  # none of them is asked for
    assert gpt.mtp_block_spec == "dense"


def test_a_script_for_dense_layers_is_told_which_one_to_run():
    plain = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"run examples/megatron_lm/pretrain_nsa\.py"):
        build_module(megatron_lm.spec, config=plain, layer_number=1)


# --- which layers a stage has ----------------------------------------------------------------------------------------


def experts_of(spec) -> list[bool]:
    """Whether the MLP of each layer is one of experts."""
    return ["experts" in repr(layer.submodules.mlp).lower() for layer in spec.layer_specs]


@pytest.mark.parametrize(("frequency", "expected"), [(2, [1, 0, 1, 0, 1, 0, 1, 0]), ([0, 0, 0, 1, 1, 0, 1, 1],) * 2])
def test_layers_of_experts_are_where_they_belong(monkeypatch, frequency, expected):
    config = make_config(
        num_layers=8,
        num_moe_experts=2,
        moe_layer_freq=frequency,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype="unused",
        overlap_p2p_comm=True,
    )
    found = {}
    for rank in (0, 1):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        for chunk in (0, 1):
            found[chunk, rank] = experts_of(nsa_block_spec(config, vp_stage=chunk))
    assert [experts for key in sorted(found) for experts in found[key]] == [bool(e) for e in expected]


def test_a_chunk_needs_its_number():
    config = make_config(
        num_layers=4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype="unused",
        overlap_p2p_comm=True,
    )
    with pytest.raises(ValueError, match=r"pass vp_stage=0\.\.1"):
        nsa_block_spec(config)


def test_experts_are_said_for_every_layer():
    with pytest.raises(ValueError, match="write 2 of them"):
        nsa_block_spec(make_config(num_layers=2, num_moe_experts=2, moe_layer_freq=[0, 1, 1]))
