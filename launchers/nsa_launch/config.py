"""A run's YAML file: what is trained (`nsa_dist.train.config`) and, under `launch:`, by which processes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.config_errors import is_secret, parse
from nsa_dist.train.files.marker import NAME
from nsa_dist.train.files.places import expanded
from nsa_dist.train.refused import Refused
from nsa_dist.train.sections.section import Section
from nsa_launch import overrides as command_line
from nsa_launch import yaml_values

_LONGEST_FILE = 2**20  # bytes
_FIRST_ARGUMENT = "the first argument is a YAML file"


class LaunchSection(Section):
    """How many processes, on what, and how patient to be with them. Times are seconds."""

    nodes: int = Field(default=1, ge=1, description="machines")
    processes_per_node: int | None = Field(
        default=None, ge=1, description="ranks on a machine; null: as many as one replica needs"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="of the ranks; auto: cuda where torch sees a GPU"
    )
    cpus_per_process: float = Field(default=1.0, gt=0, description="reserved in Ray; whole ones become CPU threads")

    address: str = Field(
        default="auto",
        description="of Ray; auto: $RAY_ADDRESS or a Ray of its own; local: one of its own; or host:port",
    )
    accelerator_type: str | None = Field(default=None, description="Ray's name of a GPU model, such as H200")
    label_selector: dict[str, str] = Field(default_factory=dict, description="labels a node must have")
    nvlink_label: str | None = Field(default=None, description="node label that names an NVLink domain; null: the node")
    allow_split_groups: bool = Field(default=False, description="let tp*cp groups leave their NVLink domain")
    env: dict[str, str | None] = Field(
        default_factory=dict, description="environment of every process, such as NCCL_*; null: as the launcher's own"
    )

    max_failures: int = Field(default=3, ge=0, description="times that lost processes are started again")
    process_group_timeout_s: float = Field(default=600, gt=0, description="a collective this late means a hung rank")
    stall_steps: float = Field(
        default=10, gt=0, description="a step this many times longer than the last ones is said to stand still"
    )
    stall_least_s: float = Field(
        default=30, gt=0, description="but no sooner than this, or half of process_group_timeout_s if that is less"
    )
    start_timeout_s: float = Field(default=300, gt=0, description="one attempt to place and start all processes")
    resources_timeout_s: float = Field(default=1800, gt=0, description="waiting for a cluster to have room")
    min_data_parallel_size: int | None = Field(
        default=None, ge=1, description="replicas to go on with when nodes are gone for good; null: wait for all nodes"
    )
    shrink_after_s: float = Field(default=600, gt=0, description="waiting for lost nodes before fewer replicas go on")
    stop_grace_s: float = Field(default=120, gt=0, description="from a signal to the end, checkpoint included")

    @property
    def rendezvous_timeout_s(self) -> float:
        """Of the default group until all ranks have met in it; then it is `process_group_timeout_s`."""
        return max(self.start_timeout_s, self.process_group_timeout_s)

    @field_validator("env", "label_selector")
    @classmethod
    def _check_names(cls, named: dict[str, str | None]) -> dict[str, str | None]:
        for name, value in named.items():
            if not name or "=" in name or not name.isprintable() or "\0" in (value or ""):
                raise ValueError(f"{name!r} is no name, or its value has a zero byte, which no process takes; drop it")
        return named

    @field_serializer("env", when_used="json")
    def _masked(self, env: dict[str, str | None]) -> dict[str, str | None]:
        """Whatever is written down has null for a secret, which takes it from the launcher's environment again."""
        return {name: None if is_secret(name) else value for name, value in env.items()}

    @property
    def secrets(self) -> dict[str, str]:
        """Of `env`; they are in no file of the run, and in none of Ray's."""
        return {name: value for name, value in self.env.items() if value is not None and is_secret(name)}

    @property
    def public_env(self) -> dict[str, str]:
        """The rest of `env`."""
        return {name: value for name, value in self.env.items() if value is not None and not is_secret(name)}


class RunConfig(TrainConfig):
    """One YAML file. Raises ValueError (pydantic's ValidationError) that says what to change."""

    launch: LaunchSection = LaunchSection()

    @property
    def processes_per_node(self) -> int:
        """As configured, or as few as hold one replica of the model."""
        return self.launch.processes_per_node or -(-self.parallel.model_parallel_size // self.launch.nodes)

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.launch.nodes * self.processes_per_node

    @property
    def group_size(self) -> int:
        """Consecutive ranks that exchange data in every layer: tensor parallel times context parallel."""
        return self.parallel.tensor_model_parallel_size * self.parallel.context_parallel_size


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of one run, its paths absolute. ValueError says what is wrong with which key.

    Paths become absolute because Ray changes the working directory of the processes it starts. What `launch.env` has
    as null comes from this process's environment.
    """
    config = checked(path, overrides)
    places = {
        "run": config.run.model_copy(update={name: expanded(name, place) for name, place in _places(config)}),
        "data": config.data.moved(expanded),
        "launch": config.launch.model_copy(update={"env": _filled(config.launch.env, path)}),
    }
    config = config.model_copy(update=places)
    _check_own_file(path, config)
    return config


def _places(config: RunConfig) -> list[tuple[str, Path]]:
    """The folders of section `run`."""
    places = (("output_dir", config.run.output_dir), ("start_from", config.run.start_from))
    return [(name, place) for name, place in places if place is not None]


def checked(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load`, with paths as they are written."""
    return parse(RunConfig, command_line.apply(_read(path), overrides, RunConfig), str(path))


def _filled(env: Mapping[str, str | None], path: Path) -> dict[str, str]:
    for name, value in env.items():
        if value is None and name not in os.environ:
            raise Refused(
                f"launch.env.{name} is null in {path}, which stands for the launcher's own {name} (a run's config.yaml "
                f"has it for every secret), and the environment has none; export {name}, or give launch.env.{name}=..."
            )
    return {name: os.environ[name] if value is None else value for name, value in env.items()}


def _check_own_file(path: Path, config: RunConfig) -> None:
    """A run whose folder was moved has its old place in its config.yaml, where it would begin anew."""
    home, named = path.absolute().parent, config.run.output_dir
    if config.run.resume and (home / NAME).exists() and not (named / NAME).exists():
        raise Refused(
            f"{path} lies in the folder of a run and says output_dir={named}, where there is none to go on with; if "
            f"the folder was moved, give output_dir={home}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_FILE + 1)
        if len(text) > _LONGEST_FILE:
            raise Refused(f"{path} is longer than {_LONGEST_FILE} bytes, so it is no configuration; {_FIRST_ARGUMENT}")
        raw = yaml_values.read(text.decode("utf-8"), RunConfig)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); {_FIRST_ARGUMENT}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); {_FIRST_ARGUMENT}") from None
    except ValueError as error:
        raise error if isinstance(error, Refused) else Refused(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise Refused(f"{path} holds {type(raw).__name__}, but a configuration is a mapping of sections such as run:")
    return raw
