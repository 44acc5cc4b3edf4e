"""A run's model as a folder: plain PyTorch's of one with NSA, a Llama or Qwen 3 of a dense one."""

from pathlib import Path
from typing import NamedTuple

from nsa_dist.convert.write import write_dense
from nsa_dist.inference.folder import save_model
from nsa_dist.train.export.dense import dense_model, is_dense
from nsa_dist.train.export.run import config_of, plain_model
from nsa_dist.train.export.tokenizer import tokenizer_files
from nsa_dist.train.files.output import OutputDir


class Written(NamedTuple):
    """What a folder got."""

    kind: str
    num_weights: int
    dtype: str
    step: int
    notices: tuple[str, ...]


def write(run: Path, to: Path, step: int | None = None, tokenizer: Path | None = None) -> Written:
    """Write the run's model of its newest intact checkpoint, or that of `step`, into `to`.

    Refused as `plain_model`, `dense_model` and `tokenizer_files`, before anything is written.
    """
    if is_dense(run):
        dense, chosen = dense_model(run, step)
        write_dense(dense, to, tokenizer_files(run, tokenizer))
        kind, weights, dtype = "a dense model", list(dense.weights.values()), dense.dtype
    else:
        plain, chosen = plain_model(run, step)
        save_model(plain, to, tokenizer_files(run, tokenizer))
        kind, weights, dtype = "an NSA model", list(plain.parameters()), plain.config.dtype
    return Written(kind, sum(x.numel() for x in weights), dtype, chosen.step, (*chosen.notices, *_left_out(run)))


def _left_out(run: Path) -> tuple[str, ...]:
    """What people should know of a checkpoint that is in no folder."""
    layers = config_of(OutputDir(run)).model.num_mtp_layers
    if not layers:
        return ()
    return (
        f"layers of multi-token prediction ({layers}) stayed in the run: the folder has the model of the next token",
    )
