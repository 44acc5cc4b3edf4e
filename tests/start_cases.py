"""Runs that begin with others' weights: importable, because spawned processes find their work by name."""

import shutil
from pathlib import Path

import torch.distributed as dist

from nsa_dist.train.config import TrainConfig
from train_cases import StopAfter, run, small_config

SIZES = {
    "cmp_block_len": 8, "cmp_stride": 4, "slc_block_len": 16, "num_slc_blocks": 4, "num_init_blocks": 1,
    "num_local_blocks": 2, "window_len": 20,
}  # fmt: skip
LAYOUTS: dict[str, dict] = {
    "CP2": {"parallel": {"context_parallel_size": 2}},
    "TP2": {"parallel": {"tensor_model_parallel_size": 2}},
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}},
}


def config(base: Path, name: str, **sections: dict) -> TrainConfig:
    model = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16,
        "ffn_hidden_size": 64, "tie_embeddings": True, "qk_norm": "rms", "norm_eps": 1e-6,
    }  # fmt: skip
    lengths = {"steps": 4, "start_from": base / "nsa", "checkpoint_interval": 4, "eval_interval": 4}
    return small_config(
        base,
        name,
        model={**model, **sections.pop("model", {})},
        nsa={**SIZES, "rotary_base": 1e6, "gate_bias": True, **sections.pop("nsa", {})},
        run={**lengths, **sections.pop("run", {})},
        **{"optimizer": {"lr": 1e-2, "warmup_steps": 0}, **sections},
    )


def of_a_run(base: Path, name: str, source: str, **sections: dict) -> TrainConfig:
    """One step from another run's weights, which are judged before it."""
    run_keys = {"steps": 1, "start_from": base / source, **sections.pop("run", {})}
    return config(base, name, run=run_keys, **sections)


def runs(rank: int, base: Path) -> None:
    """One that stops and goes on where its folder is gone; the same over heads; and two that move no weight."""
    if rank == 0:
        shutil.copytree(base / "nsa", base / "gone")
    dist.barrier()
    moved = {"start_from": base / "gone"}
    run(config(base, "CP2", run=moved, **LAYOUTS["CP2"]), StopAfter(2))
    if rank == 0:
        shutil.rmtree(base / "gone")
    dist.barrier()
    run(config(base, "CP2", run=moved, **LAYOUTS["CP2"]).resuming())
    run(config(base, "moving TP2", **LAYOUTS["TP2"]), StopAfter(3))
    lengthened(rank, base)
    for name in ("TP2", "PP2"):
        still = {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "warmup_steps": 0}
        run(config(base, name, run={"steps": 1}, optimizer=still, **LAYOUTS[name]))


def lengthened(rank: int, base: Path) -> None:
    """Runs of runs: in another layout, with another rotary base, in bf16, longer, and of dense layers."""
    told = StopAfter(2)
    run(of_a_run(base, "of CP2", "CP2", **LAYOUTS["PP2"]), told)
    if rank == 0:
        (base / "told.txt").write_text("\n".join(told.notices))
    told = StopAfter(2)
    run(of_a_run(base, "slower turns", "CP2", nsa={"rotary_base": 1e7}, **LAYOUTS["TP2"]), told)
    if rank == 0:
        (base / "told of turns.txt").write_text("\n".join(told.notices))
    run(of_a_run(base, "bf16 of CP2", "CP2", run={"dtype": "bf16"}, **LAYOUTS["CP2"]))
    dense = {"model": {"attention": "dense"}, **LAYOUTS["TP2"]}
    run(config(base, "dense", run={"start_from": None}, **dense))
    run(of_a_run(base, "of dense", "dense", **dense))
    longer = {"sequence_length": 512, "dtype": "bf16"}
    run(of_a_run(base, "longer", "dense", run=longer, **dense))
