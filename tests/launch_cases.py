"""The smallest run that has everything in it, as the launcher's tests need it."""

from pathlib import Path

import yaml

from nsa_launch.config import RunConfig, load

TINY = {
    "run": {"steps": 24, "sequence_length": 256, "checkpoint_interval": 5, "eval_interval": 100, "eval_batches": 1},
    "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "ffn_hidden_size": 64},
    "nsa": {"num_slc_blocks": 3, "window_len": 64},
    "parallel": {"context_parallel_size": 2},
    "optimizer": {"warmup_steps": 2},
    "launch": {"device": "cpu", "cpus_per_process": 0.5},
}


def tiny_file(folder: Path, corpus: Path | None = None) -> Path:
    """A YAML file of the tiny run below `folder`, its output in `folder/run`."""
    raw = {**TINY, "run": {**TINY["run"], "output_dir": str(folder / "run")}}
    if corpus is not None:
        raw["data"] = {"folder": str(corpus), "pattern": "*.txt", "validation_fraction": 0.5}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def tiny(folder: Path, *overrides: str) -> RunConfig:
    return load(tiny_file(folder), overrides)
