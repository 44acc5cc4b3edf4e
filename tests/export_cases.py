"""Runs in several layouts, what is exported of them, and Megatron's logits: importable, as spawned processes need."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.mcore.cpu import megatron_on_cpu
from nsa_dist.train.export.run import choose, megatron_model, plain_model
from nsa_dist.train.files.output import OutputDir
from train_cases import run, small_config

LAYOUTS: dict[str, dict] = {
    "TP2": {
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "model": {"qk_norm": "rms", "norm_eps": 1e-3},
        "nsa": {
            "gate_bias": True, "no_rope_freq": 2, "rotary_base": 100.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 4, "original_max_position_embeddings": 32},
        },
    },
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}, "model": {"tie_embeddings": False, "qk_norm": "l2"},
            "nsa": {"rotary_percent": 0.5}},
    "CP2": {
        "parallel": {"context_parallel_size": 2},
        "nsa": {"compression": "mean", "shared_kv": True, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
    },
    "experts": {
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "model": {"num_experts": 4, "moe_layer_freq": [0, 1], "moe_ffn_hidden_size": 20,
                  "moe_shared_expert_intermediate_size": 12},
    },
    "one expert a token": {
        "parallel": {"context_parallel_size": 2},
        "model": {"num_experts": 3, "moe_router_topk": 1, "moe_router_pre_softmax": True},
    },
    "predicts ahead": {
        "parallel": {"pipeline_model_parallel_size": 2},
        "model": {"mtp_num_layers": 2, "tie_embeddings": True}, "data": {"documents": "packed"},
    },
}  # fmt: skip


class Logits(NamedTuple):
    """Of the same tokens."""

    megatron: Tensor
    exported: Tensor
    cached: Tensor  # exported as well, through a cache


def trained(_rank: int, base: Path) -> None:
    """Two steps in each layout."""
    for name, sections in LAYOUTS.items():
        run(small_config(base, name, **sections, run={"steps": 2}, optimizer={"warmup_steps": 0}))
        dist.barrier()


def compared(base: Path) -> dict[str, Logits]:
    """In a process without groups."""
    tokens = torch.arange(200) * 7 % 256
    found = {}
    for name in LAYOUTS:
        step = choose(OutputDir(base / name)).step
        with megatron_on_cpu(), megatron_model(base / name, step) as (_, model), torch.no_grad():
            megatron = model(tokens[None], torch.arange(200)[None], None)[0]
        plain, _ = plain_model(base / name)
        cache = plain.make_cache(200)
        seq = cache.new_sequence()
        parts = [plain.prefill(tokens[:150], cache, [seq])]
        parts += [plain.decode(tokens[None, i : i + 5], cache, [seq])[0] for i in range(150, 200, 5)]
        found[name] = Logits(megatron.float(), plain(tokens), torch.cat(parts))
    return found
