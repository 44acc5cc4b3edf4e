"""A run's first weights, `run.start_from`: out of an exported or converted folder, or of another run's checkpoint."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nsa_dist.inference.folder import CONFIG, load_model
from nsa_dist.inference.model import GPTConfig
from nsa_dist.inference.text import TOKENIZER
from nsa_dist.rope_scaling import scaling_of
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.export.names import plain_config, plain_name
from nsa_dist.train.export.run import Chosen, choose, config_of
from nsa_dist.train.files.marker import NAME, RunMarker
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.model import sharding_metadata
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens.sets import padded_vocab_size, read_all, vocab_size
from nsa_dist.train.world import World

# What a run may have otherwise than what it starts from.
_FREE = {"dtype", "sequence_length", "end_of_document", "vocab_size", "tokenizer"}
# What may be changed for longer contexts: no weight depends on it, what the model computes does.
_LENGTHENS = {"rotary_base", "rope_scaling"}


class FirstWeights(NamedTuple):
    """`fill` puts this process's part of them into a model; `notices` are what people should read about them."""

    fill: Callable[[GPTModel], None] | None = None
    notices: tuple[str, ...] = ()


def check(config: TrainConfig) -> None:
    """Refused unless `run.start_from` is a run or a model, of the sizes that this run has. Reads no weights."""
    folder = config.run.start_from
    if folder is None:
        return
    if folder.resolve() == config.run.output_dir.resolve():
        raise Refused(
            f"start_from={folder} is the run's own output_dir, and a new run takes its first weights from another's; "
            f"set resume=true instead to go on with the run, or take another output_dir"
        )
    theirs, where = _theirs(folder, config)
    ours = plain_config(config)
    differ = [name for name in _differing(theirs, ours) if name not in _LENGTHENS]
    if differ:
        lines = [f"  {name}: {folder} has {getattr(theirs, name)}, the run {getattr(ours, name)}" for name in differ]
        raise Refused(
            f"start_from={folder} is another model than what this run describes, so its weights have no place:\n"
            + "\n".join(lines)
            + f"\ngive the values of {where}"
        )
    if theirs.tokenizer != ours.tokenizer or theirs.vocab_size < vocab_size(config):
        raise Refused(
            f"start_from={folder} has {theirs.vocab_size} rows for tokens of kind {theirs.tokenizer}, and the run's "
            f"data has {vocab_size(config)} of kind {ours.tokenizer}, so a row would stand for another token; build "
            f"data.tokens with the model's own tokenizer (nsa-dist data build --tokenizer)"
        )
    _check_tokenizer(folder, config)


def first_weights(config: TrainConfig, world: World) -> FirstWeights:
    """Of `run.start_from`, which was checked; none without. Every process calls it.

    Refused for a run that has no intact checkpoint.
    """
    folder = config.run.start_from
    if folder is None:
        return FirstWeights()
    theirs, ours = _theirs(folder, config)[0], plain_config(config)
    changed = tuple(
        f"{name} is {getattr(ours, name)}, and {folder} was trained with {getattr(theirs, name)}"
        for name in _differing(theirs, ours)
    )
    held = config_of(OutputDir(folder)).model.num_mtp_layers if is_run(folder) else 0
    changed += _drawn(held, config.model.num_mtp_layers, folder)
    if not is_run(folder):
        return FirstWeights(partial(_fill_from_folder, config=config), changed)
    chosen = Chosen(*world.agreed(lambda: choose(OutputDir(folder))))
    fill = partial(_fill_from_checkpoint, path=OutputDir(folder).checkpoint(chosen.step), num_mtp_layers=held)
    return FirstWeights(
        fill, (f"the first weights are those of step {chosen.step} of {folder}", *chosen.notices, *changed)
    )


def is_run(folder: Path) -> bool:
    """Whether a run of the trainer is kept there, rather than a model alone."""
    return RunMarker.read(folder) is not None


def _drawn(held: int, wanted: int, folder: Path) -> tuple[str, ...]:
    """That some layers of multi-token prediction begin as they were drawn."""
    if wanted <= held:
        return ()
    which = "they" if not held else f"those behind the first {held}"
    return (f"{folder} has {held or 'no'} layers of multi-token prediction, the run {wanted}: {which} begin as drawn",)


def _fill_from_checkpoint(model: GPTModel, path: Path, num_mtp_layers: int) -> None:
    """Layers of multi-token prediction behind the `num_mtp_layers` of the checkpoint stay as they are."""
    whole = model.sharded_state_dict(metadata=sharding_metadata(model.config))
    missing = {name for name in whole if name.startswith("mtp.") and int(name.split(".")[2]) >= num_mtp_layers}
    held = {name: x for name, x in whole.items() if name not in missing}
    found = dist_checkpointing.load({"model": held}, str(path))["model"]
    drawn = {name: x for name, x in model.state_dict().items() if name in missing}
    model.load_state_dict(found | drawn)


def _fill_from_folder(model: GPTModel, config: TrainConfig) -> None:
    assert config.run.start_from is not None
    plain = load_model(config.run.start_from).state_dict()
    rows = padded_vocab_size(config)
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            continue
        whole = plain[_name(name, model, config)]
        if "word_embeddings" in name or "output_layer" in name:
            whole = _as_many_rows(whole, rows)
        with torch.no_grad():
            parameter.copy_(_part(name, whole, parameter))


def _theirs(folder: Path, config: TrainConfig) -> tuple[GPTConfig, str]:
    """The sizes of what is there, and where they can be read. Refused where its layers are of another kind."""
    if is_run(folder):
        run = config_of(OutputDir(folder))
        attention, where = run.model.attention, f"{folder / NAME}, under identity"
        theirs = plain_config(run)
    else:
        attention, where = "nsa", f"{folder / CONFIG} ({folder / 'train.yaml'} has them if nsa-dist convert wrote it)"
        theirs = _of_folder(folder)
    if attention != config.model.attention:
        raise Refused(
            f"start_from={folder} has model.attention={attention}, and the run {config.model.attention}, whose layers "
            f"have other weights; take attention={attention}, or leave start_from out"
        )
    return theirs, where


def _check_tokenizer(folder: Path, config: TrainConfig) -> None:
    """Refused for another tokenizer than the weights were trained with, where what is there tells which that was."""
    ours = read_all(config.data)[0].tokenizer if config.data.token_sets else {"kind": "bytes"}
    if ours["kind"] == "bytes":
        return  # theirs are bytes as well, whether they lie in a token set or not
    if is_run(folder):
        theirs = read_all(config_of(OutputDir(folder)).data)[0].tokenizer
    elif (folder / TOKENIZER).is_file():
        theirs = {**ours, "sha256": hashlib.sha256((folder / TOKENIZER).read_bytes()).hexdigest()}
    else:
        return
    if theirs != ours:
        raise Refused(
            f"start_from={folder} was trained on tokens of {dict(theirs)}, and the run's data has those of "
            f"{dict(ours)}, so a row would stand for another token; build data.tokens with the model's own tokenizer "
            f"(nsa-dist data build --tokenizer)"
        )


def _of_folder(folder: Path) -> GPTConfig:
    try:
        return GPTConfig.of_json(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            f"start_from={folder} has no {CONFIG} that can be read ({error}), so its weights are unknown; give a "
            f"run's output_dir, or a folder that nsa-dist convert or nsa-dist export wrote"
        ) from error


def _differing(theirs: GPTConfig, ours: GPTConfig) -> list[str]:
    names = [field.name for field in fields(GPTConfig) if field.name not in _FREE]
    return [name for name in names if _meaning(theirs, name) != _meaning(ours, name)]


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
