"""A run's YAML file: what is trained (`nsa_dist.train.config`) and, under `launch:`, by which processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from nsa_dist.train.config import Section, TrainConfig
from nsa_dist.train.config_errors import parse
from nsa_dist.train.files.marker import NAME
from nsa_launch import overrides as command_line


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
    env: dict[str, str] = Field(default_factory=dict, description="environment of every process, such as NCCL_*")

    max_failures: int = Field(default=3, ge=0, description="times that lost processes are started again")
    process_group_timeout_s: float = Field(default=600, gt=0, description="a collective this late means a hung rank")
    start_timeout_s: float = Field(default=300, gt=0, description="one attempt to place and start all processes")
    resources_timeout_s: float = Field(default=1800, gt=0, description="waiting for a cluster to have room")
    stop_grace_s: float = Field(default=120, gt=0, description="from a signal to the end, checkpoint included")


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

    Paths become absolute because Ray changes the working directory of the processes it starts.
    """
    config = checked(path, overrides)
    folder = config.data.folder
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": config.run.output_dir.expanduser().absolute()}),
            "data": config.data.model_copy(update={"folder": folder and folder.expanduser().absolute()}),
        }
    )
    _check_own_file(path, config)
    return config


def checked(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load`, with paths as they are written."""
    return parse(RunConfig, command_line.apply(_read(path), overrides, RunConfig), str(path))


def _check_own_file(path: Path, config: RunConfig) -> None:
    """A run whose folder was moved has its old place in its config.yaml, where it would begin anew."""
    home, named = path.absolute().parent, config.run.output_dir
    if config.run.resume and (home / NAME).exists() and not (named / NAME).exists():
        raise ValueError(
            f"{path} lies in the folder of a run and says output_dir={named}, where there is none to go on with; if "
            f"the folder was moved, give output_dir={home}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); the first argument is a YAML file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path} holds {type(raw).__name__}, but a configuration is a mapping of sections such as run:"
        )
    return raw


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
