"""Every rule of a configuration, and that its error names the remedy."""

from pathlib import Path

import pytest
import yaml

from nsa_dist.cp.options import FetchOptions
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.config_errors import parse

ROOT = Path(__file__).parent.parent.parent
RUN = {"output_dir": "out"}
EXPERTS = {"num_experts": 4, "num_query_groups": 2}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def check(raw: dict) -> TrainConfig:
    return parse(TrainConfig, {"run": RUN, **raw}, "a.yaml")


def test_defaults_hold_together():
    config = check({})
    assert config.data_parallel_size(1) == 1
    assert config.nsa.sizes().num_slc_blocks == 16


@pytest.mark.parametrize(
    ("raw", "remedy"),
    [
        ({"run": {**RUN, "sequence_length": 1000}}, "take sequence_length=1024"),
        (
            {"run": {**RUN, "sequence_length": 1024}, "parallel": {"context_parallel_size": 3}},
            "2 \\* context_parallel_size \\* slc_block_len = 6 \\* 64 = 384.*take sequence_length=1152",
        ),
        (
            {
                "run": {**RUN, "sequence_length": 1000},
                "parallel": {"context_parallel_size": 2, "layout": "contiguous"},
            },
            "take sequence_length=1024",
        ),
        ({"parallel": {"tensor_model_parallel_size": 2}}, "take num_query_groups=2 or a smaller"),
        (
            {"model": {"num_query_groups": 2, "ffn_hidden_size": 383}, "parallel": {"tensor_model_parallel_size": 2}},
            "take ffn_hidden_size=384",
        ),
        ({"model": {"num_layers": 3}, "parallel": {"pipeline_model_parallel_size": 2}}, "take num_layers=4"),
        ({"parallel": {"sequence_parallel": True}}, "set sequence_parallel=false"),
        ({"model": {"num_attention_heads": 6, "num_query_groups": 4}}, "take num_attention_heads=8"),
        ({"model": {"head_dim": 7}}, "take head_dim=8"),
        ({"model": {"moe_router_topk": 4}}, "moe_router_topk=4 without num_experts.*give num_experts, or leave it out"),
        ({"model": EXPERTS | {"moe_router_topk": 5}}, "moe_router_topk=5 must be at most num_experts=4.*topk=2"),
        ({"model": EXPERTS | {"moe_router_topk": 1}}, "set moe_router_pre_softmax=true, or take moe_router_topk=2"),
        ({"model": EXPERTS | {"moe_layer_freq": [1]}}, "a list of num_layers=2 numbers, 0 or 1.*take moe_layer_freq=1"),
        ({"model": EXPERTS | {"moe_layer_freq": [0, 0]}}, "one at least; take moe_layer_freq=1"),
        ({"model": EXPERTS | {"moe_layer_freq": [0, 2]}}, "take moe_layer_freq=1"),
        ({"model": EXPERTS | {"moe_layer_freq": 0}}, "take moe_layer_freq=1"),
        ({"model": EXPERTS, "parallel": {"tensor_model_parallel_size": 2}}, "set sequence_parallel=true"),
        (
            {"model": EXPERTS | {"moe_ffn_hidden_size": 7}, "parallel": TENSOR},
            "moe_ffn_hidden_size=7 must be a multiple.*take moe_ffn_hidden_size=8",
        ),
        (
            {"model": EXPERTS | {"moe_shared_expert_intermediate_size": 7}, "parallel": TENSOR},
            "take moe_shared_expert_intermediate_size=8",
        ),
        (
            {"model": {"mtp_loss_scaling_factor": 0.3}},
            "0.3 without mtp_num_layers.*give mtp_num_layers=1, or leave it out",
        ),
        ({"model": {"mtp_num_layers": 0}}, "mtp_num_layers: .*greater than or equal to 1"),
        (
            {"run": {**RUN, "sequence_length": 128}, "model": {"mtp_num_layers": 128}},
            "must be below sequence_length=128.*take mtp_num_layers=1",
        ),
        ({"parallel": {"expert_model_parallel_size": 2}}, "must be 1, because.*leave it out, and cut every expert by"),
        ({"nsa": {"cmp_stride": 17}}, "take cmp_block_len=34"),
        ({"nsa": {"num_slc_blocks": 2}}, "raise it to 3 or force fewer"),
        ({"optimizer": {"lr": 1e-4}}, "take min_lr=1e-05"),
        ({"run": {**RUN, "steps": 10}, "optimizer": {"warmup_steps": 10}}, "take warmup_steps=1"),
        ({"run": {**RUN, "stpes": 3}}, "run.stpes: no such key; did you mean 'steps'"),
        ({"parallel": {"kv_fetch_budget_bytes": 0}}, "parallel: .*kv_fetch_budget_bytes=0 must be positive.*pass None"),
        ({"parallel": {"head_groups": 0}}, "head_groups=0 must be at least 1.*pass 1 to"),
        ({"parallel": {"context_parallel_size": 2, "domain_size": 3}}, r"domain_size=3 must divide the 2 .*\[1, 2\]"),
        ({"parallel": {"domain_size": 2, "link_gb_per_s": 50}}, "needs whole_shard_fraction=1.*leave one of them out"),
        ({"parallel": {"whole_shard_fraction": 1.5}}, r"whole_shard_fraction=1.5 .*must lie in \(0, 1\]"),
        ({"parallel": {"link_gb_per_s": 0}}, "link_gb_per_s=0 must be positive.*or null"),
        ({"parallel": {"link_gb_per_s": 50, "whole_shard_fraction": 0.5}}, "both given.*leave one of them out"),
        ({"modle": {}}, "modle: no such key; did you mean 'model'"),
        ({"run": {**RUN, "lr": 1}}, "it belongs to the section 'optimizer'"),
        ({"run": {}}, "run.output_dir: this key is needed"),
        ({"run": {**RUN, "steps": "many"}}, "run.steps: .*integer.*given 'many'"),
        ({"nsa": {"compression": "max"}}, "nsa.compression: .*'mlp' or 'mean'.*given 'max'"),
    ],
)
def test_errors_name_the_remedy(raw, remedy):
    with pytest.raises(ValueError, match=remedy):
        check(raw)


@pytest.mark.parametrize(
    ("freq", "expected"), [(1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), (9, [1, 0, 0, 0]), ([0, 1, 1, 1], [0, 1, 1, 1])]
)
def test_layers_with_experts(freq, expected):
    model = check({"model": {**EXPERTS, "num_layers": 4, "moe_layer_freq": freq}}).model
    assert list(map(int, model.layers_with_experts)) == expected
    assert check({}).model.layers_with_experts == (False, False)


def test_layers_of_multi_token_prediction_are_as_the_last_one():
    keys = {**EXPERTS, "num_layers": 3, "moe_layer_freq": [1, 1, 0], "attention": ["dense", "dense", "nsa"]}
    model = check({"model": {**keys, "mtp_num_layers": 2}}).model
    assert model.with_mtp(model.layers_with_experts) == (True, True, False, False, False)
    assert model.with_mtp(model.layer_attentions) == ("dense", "dense", "nsa", "nsa", "nsa")
    assert check({}).model.with_mtp((1, 2)) == (1, 2)


def test_fetch_options_reach_the_attention():
    options = {"kv_fetch_budget_bytes": 4096, "whole_shard_fraction": 0.5, "keep_pages": True, "head_groups": 2}
    assert check({"parallel": options}).parallel.fetch_options() == FetchOptions(**options)
    assert check({}).parallel.fetch_options() == FetchOptions()


@pytest.mark.parametrize(("link", "fraction"), [(50, 0.913), (400, 0.638), (1e-3, 1.0)])
def test_a_links_speed_sets_the_threshold_of_whole_shards(link, fraction):
    options = check({"parallel": {"link_gb_per_s": link, "head_groups": 2}}).parallel.fetch_options()
    assert options == FetchOptions.for_link(1e9 * link, head_groups=2)
    assert options.whole_shard_fraction == pytest.approx(fraction, abs=0.001)


def test_every_problem_gets_a_line():
    with pytest.raises(ValueError, match=r"(?s)a\.yaml is not.*run\.stpes.*optimizer\.lr"):
        check({"run": {**RUN, "stpes": 3}, "optimizer": {"lr": -1}})


def test_processes_must_make_whole_replicas():
    config = check({"parallel": {"context_parallel_size": 2}, "run": {**RUN, "global_batch_size": 2}})
    assert config.data_parallel_size(4) == 2
    with pytest.raises(ValueError, match="start 4 processes"):
        config.data_parallel_size(3)
    with pytest.raises(ValueError, match="take global_batch_size=4"):
        config.data_parallel_size(8)


def test_a_key_lives_in_one_section_only():
    names = [name for section in TrainConfig.model_fields.values() for name in section.annotation.model_fields]
    assert len(names) == len(set(names))


def test_resuming_is_a_copy():
    config = check({"run": {**RUN, "overwrite": True}})
    assert (config.resuming().run.resume, config.resuming().run.overwrite) == (True, False)
    assert (config.run.resume, config.run.overwrite) == (False, True)


def test_the_tiny_job_selects_among_more_blocks_than_it_takes():
    raw = yaml.safe_load((ROOT / "configs/tiny-cpu.yaml").read_text())
    raw.pop("launch", None)
    config = parse(TrainConfig, raw, "tiny-cpu.yaml")
    assert config.parallel.context_parallel_size == 2
    assert config.run.sequence_length >= 4096
    assert config.run.sequence_length // config.nsa.slc_block_len > 2 * config.nsa.num_slc_blocks
    assert config.nsa.window_len < config.run.sequence_length
