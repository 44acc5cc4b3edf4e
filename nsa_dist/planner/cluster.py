"""A cluster in numbers: memory, links and achieved rates, every one with where it comes from."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from nsa_dist.train.config_errors import parse
from nsa_dist.train.sections.section import Section

DEFAULT_CLUSTER = Path(__file__).parent / "clusters" / "h200-8.yaml"  # part of the package


class Constant(Section):
    """A number and its source: `measured` names how, `given` a datasheet, `assumed` is nobody's figure but ours."""

    value: float = Field(gt=0)
    evidence: Literal["measured", "given", "assumed"]
    source: str = Field(min_length=1)


Collective = Literal["all_to_all", "all_gather", "reduce_scatter"]


class Achieved(Section):
    """Bytes a second that a GPU sends in a large collective, by kind; null if it was not measured."""

    all_to_all: Constant | None = None
    all_gather: Constant | None = None
    reduce_scatter: Constant | None = None


class Link(Section):
    """One GPU's share of a link, one direction."""

    bytes_per_s: Constant
    latency_s: Constant = Field(description="of one collective, launch included")
    achieved: Achieved = Achieved()


class Rates(Section):
    """Achieved FLOP/s of one branch's kernels, counted by `cp.formulas.work`. backward: null if it has none."""

    forward: Constant
    backward: Constant | None = None


class BranchRates(Section):
    """The kernels of the attention."""

    phi: Rates
    cmp: Rates
    select: Rates
    slc: Rates
    win: Rates


class Cluster(Section):
    """Equal GPUs in equal nodes. Raises ValueError (pydantic's ValidationError) that says what to change."""

    gpu: str = Field(description="its name, for titles")
    num_nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1)
    gpu_memory_bytes: Constant
    reserved_bytes: Constant = Field(description="CUDA context, NCCL buffers and the allocator's fragments")
    intra_node: Link
    inter_node: Link
    link_efficiency: Constant = Field(description="share of bytes_per_s reached where `achieved` has no figure")
    matmul_flops_per_s: Constant
    memory_bytes_per_s: Constant
    attention: BranchRates

    @property
    def name(self) -> str:
        return f"{self.num_gpus} x {self.gpu}, " + ("one node" if self.num_nodes == 1 else f"{self.num_nodes} nodes")

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def constants(self) -> dict[str, Constant]:
        """Every number with a source, by its dotted name."""
        return dict(_constants(self, ""))


def load_cluster(path: Path, num_nodes: int | None = None) -> Cluster:
    """The checked description, of `num_nodes` if given. ValueError says what is wrong with which key."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the cluster description {path} cannot be read ({error.strerror}), and memory and seconds depend on it; "
            f"pass --cluster FILE; {DEFAULT_CLUSTER} is one to start from"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, but a cluster is a mapping with keys such as num_nodes")
    return parse(Cluster, raw if num_nodes is None else {**raw, "num_nodes": num_nodes}, str(path))


def _constants(section: Section, prefix: str):
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Constant):
            yield prefix + name, value
        elif isinstance(value, Section):
            yield from _constants(value, f"{prefix}{name}.")
