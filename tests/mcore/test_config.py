"""What NSATransformerConfig and the spec refuse, the CPU stand-in, and rotary positions. No process group."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_cases import make_config
from nsa_dist.mcore import NSASelfAttention, nsa_layer_spec
from nsa_dist.mcore.attention import NSASelfAttentionSubmodules
from nsa_dist.mcore.cpu import megatron_on_cpu
from nsa_dist.rope import rotate
from nsa_dist.rope_scaling import Rotary


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"attention_dropout": 0.1}, "set attention_dropout=0.0"),
        ({"rotary_interleaved": True}, "set rotary_interleaved=False"),
        ({"window_size": (128, 0)}, "set window_size=None"),
        ({"nsa_compression": "max"}, "must be one of .*mean.*; choose one"),
        ({"nsa_layout": "striped"}, "must be one of .*zigzag.*; choose one"),
        ({"nsa_fetch": {"keep_pages": True}}, "pass nsa_fetch=FetchOptions"),
        ({"num_query_groups": 1, "tensor_model_parallel_size": 2}, "take num_query_groups=2"),
    ],
)
def test_config_names_the_remedy(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        make_config(**changes)


def test_unknown_backend():
    with pytest.raises(ValueError, match="use 'local' where Transformer Engine is not installed"):
        nsa_layer_spec(make_config(), backend="flash")


def test_attention_needs_its_own_config():
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    submodules = NSASelfAttentionSubmodules(linear_qkv=torch.nn.Linear, linear_proj=torch.nn.Linear)
    with pytest.raises(ValueError, match=r"build the model's config from nsa_dist\.mcore"):
        NSASelfAttention(config, submodules, layer_number=1)
    with pytest.raises(ValueError, match=r"set attn_mask_type=AttnMaskType\.causal"):
        NSASelfAttention(make_config(), submodules, layer_number=1, attn_mask_type=AttnMaskType.padding)


def test_spec_names_the_mask_that_multi_token_prediction_reads():
    spec = nsa_layer_spec(make_config())
    assert spec.submodules.self_attention.params["attn_mask_type"] == AttnMaskType.causal


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in does nothing where there is CUDA")
def test_the_cpu_stand_in_leaves_no_trace():
    names = ("current_device", "synchronize", "get_rng_state", "current_stream", "Event")
    before = [getattr(torch.cuda, name) for name in names]
    with megatron_on_cpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1, device=torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
        assert torch.zeros(1).cuda().type() == "torch.cuda.FloatTensor"
    assert [getattr(torch.cuda, name) for name in names] == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    position = torch.tensor([0, 1, 7, 100, 4000])
    here = (rotate(q, position, Rotary(1e4)) * rotate(k, position + 3, Rotary(1e4))).sum(-1)
    there = (rotate(q, position + 50, Rotary(1e4)) * rotate(k, position + 53, Rotary(1e4))).sum(-1)
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)  # angles are fp32
    torch.testing.assert_close(rotate(q, position, Rotary(1e4)).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotate(q, torch.zeros(5), Rotary(1e4)), q)


def test_rotation_agrees_with_megatron():
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    x = torch.randn(6, 2, 8)
    frequency = 1e4 ** -(torch.arange(4) / 4)
    angle = torch.arange(6)[:, None] * frequency
    expected = _apply_rotary_pos_emb_bshd(x[:, None], torch.cat([angle, angle], -1)[:, None, None])
    torch.testing.assert_close(rotate(x, torch.arange(6), Rotary(1e4)), expected[:, 0])
