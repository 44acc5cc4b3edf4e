"""Every setting of Megatron's configuration is decided; what is refused says what to do. No process group."""

import argparse
import dataclasses
import io
import subprocess
import sys
import zipfile
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_cases import make_config
from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.cp.options import FetchOptions
from nsa_dist.mcore import NSATransformerConfig, nsa_block_spec, nsa_layer_spec, nsa_mtp_spec
from nsa_dist.mcore.arrivals import Arrivals
from nsa_dist.mcore.settings import HONOURED, IRRELEVANT, REFUSED, decided, refuse_settings
from nsa_dist.rope_scaling import Rotary

# Another value than those accepted, where turning it round or on is not one.
OTHER_VALUES = {
    "attention_dropout": 0.1,
    "cuda_graph_impl": "local",
    "experimental_attention_variant": "dsa",
    "expert_gtp_weight_remat_size": 2,
    "expert_tensor_parallel_num_weight_shards": 2,
    "fp4": "e2m1",
    "fp8": "hybrid",
    "gtp_weight_remat_size": 2,
    "mrope_section": [16, 24, 24],
    "normalization": "L2Norm",
    "softmax_type": "learnable",
    "tensor_parallel_num_weight_shards": 2,
    "transformer_impl": "inference_optimized",
    "window_attn_skip_freq": 2,
    "window_size": (128, 0),
}
FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}
OWN_FIELDS = {field.name for field in dataclasses.fields(NSATransformerConfig)}


def test_every_setting_is_decided():
    undecided = FIELDS - decided()
    assert not undecided, (
        f"nobody decided what an NSA layer makes of {sorted(undecided)}: see nsa_dist/mcore/settings.py"
    )


def test_no_setting_is_decided_twice():
    groups = (*HONOURED.values(), *IRRELEVANT.values())
    counts = Counter([*REFUSED, *(name for group in groups for name in group)])
    assert not [name for name, count in counts.items() if count > 1]


@pytest.mark.parametrize("name", sorted(set(REFUSED) & OWN_FIELDS))
def test_what_is_refused_names_the_remedy(name):
    with pytest.raises(ValueError, match=f"{name}=.* is not part of Native Sparse Attention.*; set {name}="):
        make_config(**{name: OTHER_VALUES.get(name, True)})


def test_arguments_of_megatron_lm_are_fields():
    """So core_transformer_config_from_args, which copies by name, brings them."""
    of_megatron_lm = {"reset_attention_mask", "reset_position_ids", "rotary_base", "rotary_percent", "sft"}
    assert of_megatron_lm | {"use_rope_scaling", "dataloader_inter_document_masking"} <= OWN_FIELDS - FIELDS
    assert not {"position_embedding_type", "seq_len_interpolation_factor"} & OWN_FIELDS  # GPTModel would read these


def test_what_is_accepted():
    for normalization in ("RMSNorm", "LayerNorm"):
        make_config(normalization=normalization)
    for name, refusal in REFUSED.items():  # among them what Megatron-LM's arguments say where nobody says anything
        for value in refusal.accepted if name in OWN_FIELDS else ():
            make_config(**{name: value})
    make_config(rotary_base=500_000, nsa_rotary_base=500_000)
    make_config(nsa_rotary_base=500_000)


def test_weights_in_as_many_shards_as_tensor_parallel_ranks():
    """What Megatron-LM of core 0.19 writes into its arguments where nobody asked for more."""
    name, expert = "tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"
    for refusal in (REFUSED[name], REFUSED[expert]):
        assert refusal.accepted_in(SimpleNamespace(tensor_model_parallel_size=2)) == (None, 1, 2)
    few = SimpleNamespace(tensor_model_parallel_size=4, expert_tensor_parallel_size=2)
    assert REFUSED[expert].accepted_in(few) == (None, 1, 2)
    refuse_settings(SimpleNamespace(tensor_model_parallel_size=2, **{name: 2, expert: 2}))
    for wrong in ({name: 4}, {expert: 4}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=4 is not part of .*=1 or .*=2"):
            refuse_settings(SimpleNamespace(tensor_model_parallel_size=2, **wrong))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"rotary_base": 500_000}, "set nsa_rotary_base=500000"),
        ({"nsa": {"window_len": 64}}, r"pass nsa=NSAConfig\("),
        ({"qk_layernorm": True, "qk_l2_norm": True}, "two norms .*; turn one of them off"),
        ({"use_rope_scaling": True, "yarn_rotary_scaling_factor": 4.0}, "two scalings .*; turn one of them off"),
        ({"add_qkv_bias": True, "nsa_gate_bias": True}, "two biases of the gates.*; turn one of them off"),
        ({"no_rope_freq": 2, "num_layers": 3}, "a divisor of num_layers=3.*; give 3 numbers"),
        ({"no_rope_freq": [0, 1]}, "a divisor of num_layers=1.*; give 1 numbers"),
        ({"rotary_percent": 0.4}, "rotary positions turn pairs of them; take percent=0.5"),
        ({"rotary_percent": 0.5, "yarn_rotary_scaling_factor": 4.0}, "take percent=1 and stretch=1"),
        ({"nsa_pack_order": "zigzag"}, "must be one of .*'sequence'.*; choose one"),
        (
            {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", "mlp_norm"]},
            "take core_attn out of offload_modules",
        ),
        (
            {"fine_grained_activation_offloading": True, "offload_modules": ["qkv_linear", "attn_proj"]},
            "take attn_proj, qkv_linear out of offload_modules",
        ),
    ],
)
def test_combinations(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        make_config(**changes)


@pytest.mark.parametrize("spec", [nsa_layer_spec, nsa_block_spec, nsa_mtp_spec])
def test_specs_need_their_own_config(spec):
    plain = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"build the model's config from nsa_dist\.mcore\.NSATransformerConfig"):
        spec(plain)


def test_a_layer_is_of_one_kind():
    with pytest.raises(ValueError, match=r"pass nsa_block_spec\(config\) to the model"):
        nsa_layer_spec(make_config(num_layers=2, num_moe_experts=2, moe_layer_freq=[0, 1]))


def test_backend_that_is_not_installed():
    with pytest.raises(ValueError, match="use backend='local'"):
        nsa_layer_spec(make_config(), backend="transformer_engine")


# --- checkpoints that hold the arguments of a run --------------------------------------------------------------------


def saved_arguments() -> bytes:
    arguments = argparse.Namespace(nsa=NSAConfig(window_len=64), nsa_fetch=FetchOptions(keep_pages=True), lr=0.1)
    file = io.BytesIO()
    torch.save({"args": arguments, "weight": torch.ones(2)}, file)
    return file.getvalue()


LOAD = """
import argparse, sys, torch, nsa_dist
torch.serialization.add_safe_globals([argparse.Namespace])  # as Megatron does
arguments = torch.load(sys.argv[1], weights_only=True)["args"]
assert arguments.nsa == nsa_dist.NSAConfig(window_len=64), arguments
assert arguments.nsa_fetch.keep_pages, arguments
"""


def test_checkpoints_load_as_weights_only(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(saved_arguments())
    subprocess.run([sys.executable, "-c", LOAD, str(path)], check=True)


def test_checkpoints_load_by_the_names_of_earlier_versions(tmp_path):
    path = tmp_path / "checkpoint.pt"
    new, old = b"cnsa_dist.cp.options\n", b"cnsa_dist.cp.fetch\n"
    with zipfile.ZipFile(io.BytesIO(saved_arguments())) as saved, zipfile.ZipFile(path, "w") as older:
        assert any(new in saved.read(name) for name in saved.namelist())
        for name in saved.namelist():
            older.writestr(name, saved.read(name).replace(new, old))
    subprocess.run([sys.executable, "-c", LOAD, str(path)], check=True)


# --- what a model hands to its layers --------------------------------------------------------------------------------

CAUSAL = torch.ones(32, 32, dtype=torch.bool).triu(1)
DOCUMENTS = CAUSAL | ((torch.arange(32) >= 8)[:, None] & (torch.arange(32) < 8))


def check(mask: torch.Tensor, bounds=(0, 32)) -> None:
    plan = ShardPlan.contiguous(bounds, 1, 16)
    Arrivals().check_mask(mask, plan, plan, 0)


def test_causal_masks_are_accepted():
    for shape in ((1, 1, 32, 32), (3, 1, 32, 32), (32, 32)):
        check(CAUSAL.expand(shape))
        check(CAUSAL.expand(shape), (0, 8, 32))
    check(DOCUMENTS, (0, 8, 32))
    for rank in range(2):
        plan = ShardPlan.zigzag([0, 64], 2, 16)
        whole = torch.ones(64, 64, dtype=torch.bool).triu(1)
        Arrivals().check_mask(whole[plan.positions(rank)][None, None], plan, plan, rank)


@pytest.mark.parametrize(
    ("mask", "bounds"),
    [
        (DOCUMENTS, (0, 32)),  # --reset-attention-mask
        (DOCUMENTS, (0, 9, 32)),
        (~CAUSAL, (0, 32)),  # true where a key is seen
        (torch.zeros(32, 32, dtype=torch.bool), (0, 32)),
        (CAUSAL.float(), (0, 32)),
        (CAUSAL[:16], (0, 32)),
        (torch.zeros(2, 32, dtype=torch.bool), (0, 32)),  # padding, one row a sample
        (torch.stack([CAUSAL, DOCUMENTS])[:, None], (0, 32)),
        (torch.ones(1, dtype=torch.bool), (0, 32)),
    ],
)
def test_other_masks_are_refused(mask, bounds):
    with pytest.raises(ValueError, match="pass attention_mask=None, and packed_seq_params with the bounds"):
        check(mask, bounds)


def test_a_mask_is_looked_at_once(monkeypatch):
    looks = []
    monkeypatch.setattr("nsa_dist.mcore.arrivals._is_causal", lambda mask, *plan: looks.append(mask.shape) or True)
    arrivals, plan = Arrivals(), ShardPlan.contiguous([0, 32], 1, 16)
    mask = CAUSAL.clone()
    for _ in range(3):
        arrivals.check_mask(mask, plan, plan, 0)
        arrivals.check_mask(mask.detach(), plan, plan, 0)  # as recomputation hands it on
    assert len(looks) == 1
    mask[3, 1] = True
    arrivals.check_mask(mask, plan, plan, 0)
    assert len(looks) == 2
    arrivals.check_mask(mask[None], plan, plan, 0)
    assert len(looks) == 3
    for _ in range(20):  # the allocator gives memory of a freed mask to the next
        arrivals.check_mask(CAUSAL.clone(), plan, plan, 0)
    assert len(looks) == 23


def angles(base: float, positions: torch.Tensor, dim: int = 8) -> torch.Tensor:
    half = positions[:, None] * base ** -(torch.arange(0, dim, 2) / dim)
    return torch.cat([half, half], -1)[:, None, None]


def test_rotary_angles_of_the_layer_are_accepted():
    for positions in (torch.arange(300), torch.tensor([0, 1, 2, 9, 10, 11]), torch.arange(9) * 100_000):
        Arrivals().check_rotary(angles(1e4, positions), 8, Rotary())
    Arrivals().check_rotary(None, 8, Rotary())


@pytest.mark.parametrize(
    "wrong",
    [
        angles(5e5, torch.arange(9)),
        angles(1.001e4, torch.arange(300)),
        angles(1e4, torch.arange(9) / 4),
        angles(1e4, torch.arange(9), 4),
        angles(1e4, torch.arange(9)).flip(-1),
        (angles(1e4, torch.arange(9)), angles(1e4, torch.arange(9))),
    ],
    ids=["base", "nearly the base", "interpolation", "percent", "order", "a pair"],
)
def test_other_rotary_angles_are_refused(wrong):
    with pytest.raises(ValueError, match="set nsa_rotary_base to the model's rotary_base"):
        Arrivals().check_rotary(wrong, 8, Rotary())
