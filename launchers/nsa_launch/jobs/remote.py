"""A configuration that is going to another machine: what is refused here, and how it is written down."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from nsa_dist.train.refused import Refused
from nsa_launch.config import RunConfig, checked
from nsa_launch.processes import check_groups


def load(path: Path, words: Sequence[str]) -> RunConfig:
    """The checked configuration of a run that starts elsewhere. ValueError for what means nothing there."""
    config = checked(path, words)
    check_groups(config)
    _check_places(config)
    if config.launch.address != "auto":
        raise Refused(
            f"launch.address={config.launch.address}, but a run that starts elsewhere joins the Ray that is started "
            f"for it there; give launch.address=auto, or start it here: nsa-dist train {path}"
        )
    if config.launch.secrets:
        name = next(iter(config.launch.secrets))
        raise Refused(
            f"launch.env.{name} is a secret, and files of jobs and clusters are read by many; set {name} where the "
            f"command will run, and give launch.env.{name}=null, which takes it from there"
        )
    return config


def _check_places(config: RunConfig) -> None:
    for key, place in {"output_dir": config.run.output_dir, **config.data.places}.items():
        if not place.is_absolute():
            raise Refused(
                f"{key}={place} is relative to a folder of this machine, and the run starts on another one; give an "
                f"absolute path on storage that every node mounts, such as {key}=/runs/{place.name}"
            )


def as_yaml(config: RunConfig) -> str:
    """The file that goes along: what differs from the defaults, and no secrets."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
