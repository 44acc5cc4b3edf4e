"""The planner's memory against models that are really built."""

from pathlib import Path

import pytest
import torch

from nsa_dist.planner import memory
from nsa_dist.planner.core.strategies import Options, Strategy
from nsa_dist.planner.shape import Shape
from nsa_dist.train.config import ModelSection, RunSection, TrainConfig
from nsa_dist.train.sections.nsa import NSASection
from planner_cases import cluster
from ranks import run_ranks
from train_cases import small_config

EXPERTS = {
    "num_experts": 6, "moe_router_topk": 2, "moe_ffn_hidden_size": 40, "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip


def tiny_config(dtype: str, num_layers: int, **changes) -> TrainConfig:
    """Several key/value heads, untied embeddings; the sizes are all different, so that none stands for another."""
    return TrainConfig(
        run=RunSection(output_dir="unused", sequence_length=256, dtype=dtype),
        model=ModelSection(
            num_layers=num_layers, hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16,
            ffn_hidden_size=80, recompute_attention=True, tie_embeddings=changes.pop("tie_embeddings", False),
            **changes.pop("experts", {}),
        ),
        nsa=NSASection(num_slc_blocks=4, window_len=64, **changes),
    )  # fmt: skip


BUILT = {
    "fp32": tiny_config("fp32", 2),
    "bf16": tiny_config("bf16", 2),
    "one layer": tiny_config("fp32", 1),
    "tied": tiny_config("fp32", 1, tie_embeddings=True),
    "shared kv, mean": tiny_config("bf16", 1, shared_kv=True, compression="mean"),
    "experts": tiny_config("fp32", 2, experts=EXPERTS),
    "experts in bf16": tiny_config("bf16", 1, experts={**EXPERTS, "moe_shared_expert_intermediate_size": None}),
    "an MLP, then experts": tiny_config("fp32", 2, experts={**EXPERTS, "moe_layer_freq": [0, 1]}),
    "predicts ahead": tiny_config("fp32", 1, experts={"mtp_num_layers": 2}),
    "predicts ahead in bf16": tiny_config("bf16", 1, experts={"mtp_num_layers": 1}, tie_embeddings=True),
    "predicts ahead by experts": tiny_config("fp32", 1, experts={**EXPERTS, "mtp_num_layers": 1}),
}


def build_and_measure(rank: int) -> dict[str, dict[str, int]]:
    """{name: bytes by kind} of models built by the trainer, after one forward, backward and optimizer step."""
    from nsa_dist.train.world import entered

    found = {}
    for name, config in BUILT.items():
        with entered(config, torch.device("cpu")) as world:
            found[name] = _measure(config, world)
    return found


def _measure(config: TrainConfig, world) -> dict[str, int]:
    from nsa_dist.train.experts.router import SampleTokens
    from nsa_dist.train.model import build

    model = build(config, world)
    parameters = list(model.module.parameters())
    known = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in known:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    length = config.run.sequence_length
    tokens = torch.arange(length)[None] % 256
    for router in model.routers.values():
        router.tokens = SampleTokens(torch.zeros(length, dtype=torch.int64), 1, length)
    depths = config.model.num_mtp_layers
    labels = torch.stack([tokens.roll(-k) for k in range(1, 2 + depths)], -1) if depths else tokens
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.module(tokens, torch.arange(length)[None], None, labels=labels)
    loss.sum().backward()
    model.optimizer.step()
    return {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(buffer.grad_data.nbytes for buffer in model.module.buffers),
        "optimizer": _tensor_bytes(model.optimizer.state_dict()),
        "saved": sum(x.untyped_storage().nbytes() for x in saved.values()),
    }


STAGES = {
    "two, untied": {"mtp_num_layers": 2},
    "one, tied": {"mtp_num_layers": 1, "tie_embeddings": True},
    "experts": {**EXPERTS, "num_layers": 2, "mtp_num_layers": 1, "moe_layer_freq": [0, 1]},
}


def stage_parameters(rank: int, base: Path) -> dict[str, tuple[int, int]]:
    """Of a pipeline stage, as it is built and as it is planned."""
    from nsa_dist.train.model import bare_model
    from nsa_dist.train.world import entered

    found = {}
    for name, model in STAGES.items():
        config = small_config(base, "x", model=model, parallel={"pipeline_model_parallel_size": 2})
        with entered(config, torch.device("cpu")) as world:
            built = sum(weight.numel() for weight in bare_model(config, world)[1].parameters())
        found[name] = built, Shape.of(config, 1, "zigzag").stage_parameters(rank)
    return found


@pytest.mark.slow
def test_the_last_stage_has_the_layers_of_multi_token_prediction(tmp_path):
    first, last = run_ranks(2, stage_parameters, tmp_path)
    for name in STAGES:
        assert first[name][0] == first[name][1]
        assert last[name][0] == last[name][1] > first[name][0]


def _tensor_bytes(state: object) -> int:
    """Of all tensors in nested containers; Adam's step counts, scalars, are left out."""
    if isinstance(state, torch.Tensor):
        return state.nbytes if state.dim() else 0
    if isinstance(state, dict):
        return sum(map(_tensor_bytes, state.values()))
    return sum(map(_tensor_bytes, state)) if isinstance(state, list | tuple) else 0


@pytest.fixture(scope="module")
def built():
    return run_ranks(1, build_and_measure)[0]


def planned(config: TrainConfig) -> dict[str, int]:
    shape = Shape.of(config, 1, "zigzag")
    return memory.rank_memory(shape, Strategy("fetch", 1.0), Options(), cluster(), 1)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("kind", ["weights", "gradients", "optimizer"])
def test_model_states_are_those_of_a_built_model(built, name, kind):
    assert planned(BUILT[name])[kind] == built[name][kind]


@pytest.mark.parametrize("name", BUILT)
def test_saved_tensors_are_those_of_a_built_model(built, name):
    """With the core recomputed, everything autograd holds after forward, byte for byte.

    On a CPU RMSNorm is not fused: it saves its input and the normalised rows in fp32, beside its output.
    """
    config = BUILT[name]
    shape, kinds = Shape.of(config, 1, "zigzag"), planned(config)
    tokens, e = shape.tokens, shape.element_bytes
    depths = config.model.num_mtp_layers
    probabilities = (1 + depths) * tokens * 256 * 4
    core_kv = memory.core_kv_bytes(shape)  # lives in the recomputed core only
    expected = kinds["activations"] + kinds["kv"] - core_kv + probabilities
    # bf16: fp32 input and rows, bf16 output, instead of both in bf16; fp32: input, rows and output instead of two.
    more = 2 * 4 + 2 - 2 * 2 if e == 2 else 3 * 4 - 2 * 4
    norms = 2 * (config.model.num_layers + depths) + 1
    # A projection of multi-token prediction reads two norms' outputs in one row. In fp32 each of its three norms keeps
    # rows beside its input; in bf16 fp32 input and rows, of the embedding and the layer's output instead of bf16.
    ahead = depths * (2 * (2 * 4 - 2) + 2 * 4 if e == 2 else 3 * 4)
    assert built[name]["saved"] == expected + (norms * more + ahead) * tokens * config.model.hidden_size
