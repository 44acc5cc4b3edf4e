"""Which processes a run needs, and whether they fit: plain arithmetic, before any of them is started."""

from dataclasses import dataclass
from math import ceil

from nsa_dist.train.refused import Refused
from nsa_launch.config import RunConfig


@dataclass(frozen=True)
class Machine:
    """What one machine offers."""

    cores: int
    gpus: int


@dataclass(frozen=True)
class Processes:
    """The processes of a run with every `auto` decided. One process is one rank."""

    nodes: int
    per_node: int
    device: str  # "cpu" or "cuda"
    backend: str  # "gloo" or "nccl"
    cpus_each: float
    gpus_each: int  # 0 on CPUs

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node

    @property
    def threads_each(self) -> int:
        """CPU threads of one process; the same for every launcher, because sums depend on it."""
        return max(1, int(self.cpus_each))


def check_groups(config: RunConfig) -> None:
    """ValueError unless replicas come out whole and tensor x context parallel groups stay within a node."""
    config.data_parallel_size(config.world_size)
    allowed_nodes(config)
    group, per_node, launch = config.group_size, config.processes_per_node, config.launch
    if launch.nodes == 1 or launch.allow_split_groups or per_node % group == 0:
        return
    if launch.nvlink_label and group % per_node == 0:
        return
    raise Refused(
        f"processes_per_node={per_node} must be a multiple of tensor * context parallel size = {group}, so that the "
        f"ranks which talk in every layer share one node's links; take "
        f"processes_per_node={ceil(per_node / group) * group}, name a node label of a wider NVLink domain in "
        f"launch.nvlink_label, or accept the network with launch.allow_split_groups=true"
    )


def allowed_nodes(config: RunConfig) -> list[int]:
    """The numbers of nodes that a run may have, the most first: all of them, or fewer whole replicas if it is elastic.

    ValueError when `launch.min_data_parallel_size` cannot be had.
    """
    launch, least = config.launch, config.launch.min_data_parallel_size
    if least is None:
        return [launch.nodes]
    full = config.data_parallel_size(config.world_size)
    found = {nodes: _replicas(config, nodes) for nodes in range(launch.nodes, 0, -1)}
    sizes = {nodes: size for nodes, size in found.items() if size >= least}
    if least in sizes.values() and len(sizes) > 1:
        return list(sizes)
    possible = sorted({size for size in found.values() if 0 < size < full})
    advice = f"take one of {', '.join(map(str, possible))}" if possible else "leave it out"
    raise Refused(
        f"launch.min_data_parallel_size={least} is not what fewer whole nodes than launch.nodes={launch.nodes} of "
        f"{config.processes_per_node} processes can make of {full} replicas with global_batch_size="
        f"{config.run.global_batch_size} shared evenly; {advice}"
    )


def check_fixed_size(config: RunConfig) -> None:
    """ValueError for an elastic run where something else decides about the number of processes."""
    least = config.launch.min_data_parallel_size
    if least is not None:
        raise Refused(
            f"launch.min_data_parallel_size={least} is for runs through Ray, as torchrun decides by itself how many "
            f"processes there are; give launch.min_data_parallel_size=null, and torchrun --nnodes MIN:MAX"
        )


def _replicas(config: RunConfig, nodes: int) -> int:
    """Of so many nodes; 0 where they are not whole, or the global batch does not divide."""
    try:
        return config.data_parallel_size(nodes * config.processes_per_node)
    except Refused:
        return 0


def decide(config: RunConfig, gpus_per_node: int, may_grow: bool = False) -> Processes:
    """Settle device and backend for nodes with that many GPUs. ValueError on what contradicts itself.

    may_grow  a cluster without any GPU may get some, so launch.device=cuda waits for them as for any other resource
    """
    launch, per_node = config.launch, config.processes_per_node
    if may_grow and launch.device == "cuda":
        gpus_per_node = gpus_per_node or per_node
    device = _device(launch.device, gpus_per_node)
    if device == "cuda" and per_node > gpus_per_node:
        raise Refused(
            f"processes_per_node={per_node} is more than the {gpus_per_node} GPUs of a node, and ranks cannot "
            f"share one, as NCCL refuses it, and Megatron-core's gradient sums do not run over gloo on GPUs; take "
            f"processes_per_node={gpus_per_node} and more nodes, or launch.device=cpu"
        )
    return Processes(
        nodes=launch.nodes,
        per_node=per_node,
        device=device,
        backend="nccl" if device == "cuda" else "gloo",
        cpus_each=launch.cpus_per_process,
        gpus_each=1 if device == "cuda" else 0,
    )


def check_machine(processes: Processes, machine: Machine) -> None:
    """ValueError unless this machine alone can hold the run."""
    if processes.nodes > 1:
        raise Refused(
            f"launch.nodes={processes.nodes}, but a Ray of one's own has this one machine; "
            f"give launch.address=HOST:PORT of a cluster, or take launch.nodes=1"
        )
    needed = processes.world_size * processes.cpus_each
    if needed > machine.cores:
        share = int(100 * machine.cores / processes.world_size) / 100
        raise Refused(
            f"{processes.world_size} processes * cpus_per_process={processes.cpus_each:g} need {needed:g} cores, and "
            f"this machine lets us use {machine.cores}; start fewer processes, or let them share cores with "
            f"launch.cpus_per_process={share:g}"
        )


def _device(requested: str, gpus_per_node: int) -> str:
    if requested == "auto":
        return "cuda" if gpus_per_node else "cpu"
    if requested == "cuda" and not gpus_per_node:
        raise Refused("launch.device=cuda, but no GPU is visible here; take launch.device=cpu, or see nsa-dist doctor")
    return requested
