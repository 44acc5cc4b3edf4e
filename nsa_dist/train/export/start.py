"""A run's first weights out of an exported or converted folder: `run.start_from`."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nsa_dist.inference.folder import CONFIG, load_model
from nsa_dist.inference.model import GPTConfig
from nsa_dist.rope_scaling import scaling_of
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.export.names import plain_config, plain_name
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens.sets import padded_vocab_size, vocab_size

# What a run may have otherwise than the folder that it starts from.
_FREE = {"dtype", "sequence_length", "end_of_document", "vocab_size", "tokenizer"}


def check(config: TrainConfig) -> None:
    """Refused unless the folder of `run.start_from` is one, of the sizes that the run has. Reads no weights."""
    folder = config.run.start_from
    if folder is None:
        return
    if config.model.has_dense:
        raise Refused(
            f"start_from={folder} has NSA in every layer, and model.attention={config.model.attention} has dense ones, "
            f"which have other weights; take attention=nsa, or leave start_from out"
        )
    theirs, ours = _of_folder(folder), plain_config(config)
    differ = [field.name for field in fields(GPTConfig) if field.name not in _FREE]
    differ = [name for name in differ if _meaning(theirs, name) != _meaning(ours, name)]
    if differ:
        lines = [f"  {name}: {folder} has {getattr(theirs, name)}, the run {getattr(ours, name)}" for name in differ]
        raise Refused(
            f"start_from={folder} is another model than what this run describes, so its weights have no place:\n"
            + "\n".join(lines)
            + f"\ngive the values of {folder / CONFIG} ({folder / 'train.yaml'} has them if nsa-dist convert wrote it)"
        )
    if theirs.tokenizer != ours.tokenizer or theirs.vocab_size < vocab_size(config):
        raise Refused(
            f"start_from={folder} has {theirs.vocab_size} rows for tokens of kind {theirs.tokenizer}, and the run's "
            f"data has {vocab_size(config)} of kind {ours.tokenizer}, so a row would stand for another token; build "
            f"data.tokens with the model's own tokenizer (nsa-dist data build --tokenizer)"
        )


def fill(model: GPTModel, config: TrainConfig) -> None:
    """Put this process's part of the folder's weights into `model`, before anything copies them."""
    assert config.run.start_from is not None
    plain = load_model(config.run.start_from).state_dict()
    rows = padded_vocab_size(config)
    for name, parameter in model.named_parameters():
        whole = plain[_name(name, model, config)]
        if "word_embeddings" in name or "output_layer" in name:
            whole = _as_many_rows(whole, rows)
        with torch.no_grad():
            parameter.copy_(_part(name, whole, parameter))


def _of_folder(folder: Path) -> GPTConfig:
    try:
        return GPTConfig.of_json(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            f"start_from={folder} has no {CONFIG} that can be read ({error}), so its weights are unknown; give a "
            f"folder that nsa-dist convert or nsa-dist export wrote"
        ) from error


def _meaning(config: GPTConfig, name: str) -> object:
    """A value as it is compared: what words and defaults stand for."""
    value = getattr(config, name)
    readings: dict[str, Callable[[], object]] = {
        "rope_scaling": lambda: scaling_of(value),
        "no_rope": lambda: [bool(each) for each in value or [0] * config.num_layers],
        "v_head_dim": lambda: value or config.head_dim,
    }
    return readings[name]() if name in readings else value


def _name(name: str, model: GPTModel, config: TrainConfig) -> str:
    """Of a weight of this stage, in the plain model; Megatron counts layers from the stage's first."""
    if name == "output_layer.weight" and config.model.tie_embeddings:  # a later stage has its own copy
        return "embedding.weight"
    if name.startswith("decoder.layers."):
        _, _, local, rest = name.split(".", 3)
        return plain_name(f"decoder.layers.{model.decoder.layers[int(local)].layer_number - 1}.{rest}")
    return plain_name(name)


def _as_many_rows(weight: Tensor, rows: int) -> Tensor:
    """No token has the rows behind the vocabulary: they are dropped or begin as zeros."""
    return torch.cat([weight[:rows], weight.new_zeros(max(0, rows - len(weight)), weight.shape[1])])


def _part(name: str, whole: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    """This tensor-parallel rank's."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    pieces = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)  # [gate | up], each cut by itself
    return torch.cat([piece.chunk(size, vars(parameter)["partition_dim"])[rank] for piece in pieces])
