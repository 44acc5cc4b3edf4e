"""From Megatron-LM's command line to the configuration, on a parser that stands in for its own."""

import dataclasses

import pytest

from megatron_lm_cases import parsed, parser, stand_in
from nsa_dist import NSAConfig
from nsa_dist.cp.options import FetchOptions
from nsa_dist.mcore import NSATransformerConfig
from nsa_dist.mcore.megatron_lm import nsa_config_from_args
from nsa_dist.rope_scaling import Llama3Scaling, Rotary, YarnScaling

# Fields that no argument sets: Megatron-LM's data decides the layout, and it has arguments of its own for positions.
NOT_ARGUMENTS = {f"nsa{name}" for name in ("", "_attention", "_fetch", "_layout", "_pack_order")}
NOT_ARGUMENTS |= {"nsa_rotary_base", "nsa_rope_scaling"}


def test_every_field_has_an_argument():
    of_config = {f.name for f in dataclasses.fields(NSATransformerConfig) if f.name.startswith("nsa")} - NOT_ARGUMENTS
    inner = {f"nsa_{f.name}" for of in (NSAConfig, FetchOptions) for f in dataclasses.fields(of)}
    names = {name for name in vars(parser().parse_args([])) if name.startswith("nsa_")}
    assert names == of_config | inner


def test_arguments_are_numbers_and_texts():
    """Megatron-LM keeps them with the weights, and reads them back as such."""
    for name, value in vars(parsed()).items():
        assert value is None or isinstance(value, int | float | str | bool), name


def test_said_nothing_is_what_nsa_layers_do():
    args = parser().parse_args([])
    assert args.position_embedding_type == "rope"
    assert args.attention_dropout == 0
    assert not args.create_attention_mask_in_dataloader
    assert not args.apply_rope_fusion
    args = parser().parse_args(["--attention-dropout", "0.1", "--position-embedding-type", "none"])
    assert (args.attention_dropout, args.position_embedding_type) == (0.1, "none")


def test_config_of_arguments_is_that_made_by_hand(monkeypatch):
    stand_in(monkeypatch)
    args = parsed(
        *["--rotary-base", "500000", "--nsa-shared-kv", "--nsa-compression", "mean", "--no-nsa-compress-before-rope"],
        *[
            "--nsa-v-head-dim",
            "8",
            "--nsa-keep-pages",
            "--nsa-domain-size",
            "1",
            "--nsa-head-groups",
            "2",
            "--nsa-kv-fetch-budget-bytes",
            "1000000",
        ],
    )
    before = dict(vars(args))
    by_hand = NSATransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        attention_dropout=0.0,
        rotary_base=500_000,
        nsa=NSAConfig(window_len=64, num_slc_blocks=4),
        nsa_shared_kv=True,
        nsa_compression="mean",
        nsa_compress_before_rope=False,
        nsa_rotary_base=500_000.0,
        nsa_v_head_dim=8,
        nsa_fetch=FetchOptions(keep_pages=True, head_groups=2, kv_fetch_budget_bytes=1_000_000, domain_size=1),
    )
    config = nsa_config_from_args(args)
    drawn = {"init_method", "output_layer_init_method", "embedding_init_method"}  # closures, anew for each config
    for field in dataclasses.fields(NSATransformerConfig):
        if field.name not in drawn:
            assert getattr(config, field.name) == getattr(by_hand, field.name), field.name
    assert vars(args) == before


def test_what_recipes_say_of_norms_positions_and_gates(monkeypatch):
    stand_in(monkeypatch)
    args = parsed("--qk-layernorm", "--nsa-gate-bias", "--rotary-base", "500000")
    args.add_bias_linear = False
    args.use_rope_scaling, args.rope_scaling_factor, args.no_rope_freq = True, 16.0, 2
    args.yarn_beta_fast = args.yarn_original_max_position_embeddings = None  # as Megatron-LM has them unless given
    config = nsa_config_from_args(args)
    assert (config.qk_layernorm, config.nsa_gate_bias) == (True, True)
    assert config.rotary_of(1) == Rotary(5e5, scaling=Llama3Scaling(16.0))
    assert config.rotary_of(2).turned(16) == 0


def test_yarn(monkeypatch):
    stand_in(monkeypatch)
    args = parsed("--position-embedding-type", "yarn")
    args.rotary_scaling_factor, args.yarn_beta_fast, args.yarn_original_max_position_embeddings = 40.0, 16.0, None
    args.mscale_all_dim = 0.5
    assert nsa_config_from_args(args).rotary.scaling == YarnScaling(40.0, beta_fast=16.0, mscale_all_dim=0.5)
    args.rotary_percent = 0.5
    with pytest.raises(ValueError, match="take percent=1 and stretch=1"):
        nsa_config_from_args(args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--attention-dropout 0.1", "set attention_dropout=0.0"),
        ("--nsa-num-slc-blocks 2", "raise it to 3"),
        ("--position-embedding-type none", "write --position-embedding-type rope"),
        ("--spec my.module spec", "leave --spec out"),
    ],
)
def test_what_is_refused(monkeypatch, words, message):
    stand_in(monkeypatch)
    with pytest.raises(ValueError, match=message):
        nsa_config_from_args(parsed(*words.split()))


def test_its_own_spec_is_what_it_builds(monkeypatch):
    stand_in(monkeypatch)
    assert nsa_config_from_args(parsed("--spec", "nsa_dist.mcore", "nsa_block_spec")).nsa.window_len == 64


def test_over_gloo_a_stage_keeps_what_it_sends(monkeypatch):
    stand_in(monkeypatch)
    for backend, frees in (("gloo", False), ("nccl", True)):
        args = parsed()
        args.distributed_backend, args.deallocate_pipeline_outputs = backend, True
        assert nsa_config_from_args(args).deallocate_pipeline_outputs is frees
