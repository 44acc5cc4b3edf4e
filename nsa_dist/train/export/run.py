"""A run's model in one process, from a checkpoint of any parallel layout, and as a plain one."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from nsa_dist.inference.model import GPT
from nsa_dist.train.config import ModelSection, TrainConfig
from nsa_dist.train.config_errors import parse
from nsa_dist.train.export.names import plain_config, plain_weights
from nsa_dist.train.files.candidates import Damaged, name_of, refusal
from nsa_dist.train.files.manifest import DamagedError, Manifest, wrong_in_content
from nsa_dist.train.files.marker import RunMarker
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.model import bare_model, sharding_metadata
from nsa_dist.train.refused import Refused
from nsa_dist.train.world import entered

_OF_MTP = ("mtp_num_layers", "mtp_loss_scaling_factor")


class Chosen(NamedTuple):
    """A checkpoint that was verified, and what people should read about it."""

    step: int
    notices: tuple[str, ...] = ()


def plain_model(run: Path, step: int | None = None) -> tuple[GPT, Chosen]:
    """The model of a run on the CPU, for evaluation, from its newest intact checkpoint or that of `step`.

    Nothing of the run is changed. Refused where there is no run, no such checkpoint, or none that is as it was written,
    and for a model with dense layers.
    """
    chosen = choose(OutputDir(run), step)
    _refuse_dense(run)
    with megatron_model(run, chosen.step) as (config, megatron):
        weights = {name: x.cpu() for name, x in plain_weights(megatron.state_dict()).items()}
    plain = GPT(plain_config(config), "meta")
    if not plain.config.tie_embeddings:
        plain.load_state_dict(weights, assign=True)
    else:
        plain.load_state_dict({name: x for name, x in weights.items() if name != "output.weight"}, assign=True)
    return plain.requires_grad_(False).eval(), chosen


def _refuse_dense(run: Path) -> None:
    model = config_of(OutputDir(run)).model
    if model.has_dense:
        raise Refused(
            f"{run} is a run with model.attention={model.attention}, and the plain model that export and generate make "
            f"has NSA in every layer (nsa-dist export writes a Llama where all are dense); evaluate this run by its "
            f"metrics.jsonl (data.tasks), or export one with model.attention=nsa"
        )


def choose(output: OutputDir, step: int | None = None) -> Chosen:
    """The checkpoint to export: every file is compared with its manifest."""
    if RunMarker.read(output.root) is None:
        raise Refused(
            f"{output.root} has no run.json, so it is no run's folder; give the output_dir of nsa-dist train, or for "
            f"generate a folder that nsa-dist export wrote"
        )
    seen = output.candidates()
    steps = [each for each in seen.whole if step in (None, each)]
    if step is not None and not steps:
        have = ", ".join(map(str, seen.whole)) or "none"
        raise Refused(f"{output.root} has no whole checkpoint of step {step}; it has {have}: name one of these")
    damaged = list(seen.damaged) if step is None else []
    for each in steps:
        wrong = _wrong(output.checkpoint(each)) if seen.has_manifests else []
        if not wrong:
            lines = [damage.line for damage in damaged if damage.step > each]
            lines += [] if seen.has_manifests else [f"{name_of(each)} has no manifest, and is loaded unverified"]
            return Chosen(each, tuple(lines))
        damaged.append(Damaged(each, "; ".join(wrong)))
    raise Refused(
        refusal(output.root, seen, damaged)
        or f"{output.root} has no checkpoint yet; let the run go on to its first (run.checkpoint_interval), or stop "
        f"it, which writes one"
    )


@contextmanager
def megatron_model(run: Path, step: int) -> Iterator[tuple[TrainConfig, GPTModel]]:
    """Inside, the run's configuration and its whole model in Megatron-core; needs no process group and leaves none.

    Both without layers of multi-token prediction, which predict no next token.
    """
    output = OutputDir(run)
    config = without_mtp(config_of(output))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with entered(config, device) as world:
            megatron, model = bare_model(config, world)
            state = {"model": model.sharded_state_dict(metadata=sharding_metadata(megatron))}
            model.load_state_dict(dist_checkpointing.load(state, str(output.checkpoint(step)))["model"])
            yield config, model.eval()
    finally:
        with suppress(ValueError):  # closed with Megatron's groups
            dist.destroy_process_group()


def config_of(output: OutputDir) -> TrainConfig:
    """What may not change of a run, without parallelism: as the marker says it."""
    raw: dict[str, dict] = {"run": {"output_dir": str(output.root)}}
    for key, value in output.marker().identity.items():
        section, _, name = key.partition(".")
        if section != "data" or (name == "tokens" and value is not None):  # the vocabulary is theirs
            raw.setdefault(section, {})[name] = value
    return parse(TrainConfig, raw, str(output.root / "run.json"))


def without_mtp(config: TrainConfig) -> TrainConfig:
    """The same run, had it predicted the next token alone."""
    defaults = {name: ModelSection.model_fields[name].default for name in _OF_MTP}
    return config.model_copy(update={"model": config.model.model_copy(update=defaults)})


def _wrong(folder: Path) -> list[str]:
    try:
        manifest = Manifest.read(folder)
    except DamagedError as error:
        return [str(error)]
    return [] if manifest is None else wrong_in_content(manifest, folder, manifest.files)
