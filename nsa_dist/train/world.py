"""The process groups of one run and the few exchanges its loop needs."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.one_sided.choice import Transport, transport_of
from nsa_dist.mcore.cpu import megatron_on_cpu
from nsa_dist.mcore.groups import groups_of_this_rank, set_timeout, timeout_of
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.refused import Refused


@dataclass(frozen=True)
class World:
    """Where this process stands in the run. Megatron's rank order makes process 0 the first of every group."""

    device: torch.device
    rank: int
    size: int
    dp_rank: int
    dp_size: int
    cp: Comm
    transport: Transport = field(default_factory=lambda: Transport("alone"))  # of `cp`

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, added in the order of ranks: the same bits in every run."""
        return Comm(dist.group.WORLD).all_gather(values, "metrics").sum(0)

    def agreed(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on process 0 (JSON), on every process.

        What it refuses there is refused on every process. Any other exception stays process 0's; the others raise
        RuntimeError with its text, so that none waits for the rest.
        """
        outcome, error = _outcome(work) if self.is_main else (None, None)
        outcome = self.gathered(outcome)[0]
        if error is not None:
            raise error
        if "refused" in outcome:
            raise Refused(outcome["refused"])
        if "failed" in outcome:
            raise RuntimeError(f"process 0 failed: {outcome['failed']}")
        return outcome["value"]

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's `value` (JSON) by rank, on every process."""
        comm, row = Comm(dist.group.WORLD), torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = comm.all_gather(torch.tensor([len(row)], device=self.device), "metrics").flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(row)] = row
        rows = comm.all_gather(padded.to(self.device), "metrics").tolist()
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        """Return when every process has come here."""
        self.sum(torch.zeros(1, device=self.device)).cpu()


def _outcome(work: Callable[[], Any]) -> tuple[dict[str, Any], Exception | None]:
    """What the others are told, and what this process raises after it has told them."""
    try:
        return {"value": work()}, None
    except Refused as refusal:
        return {"refused": str(refusal)}, refusal
    except Exception as error:  # raised again by the caller
        return {"failed": f"{type(error).__name__}: {error}"}, error


@contextmanager
def entered(config: TrainConfig, device: torch.device) -> Iterator[World]:
    """Inside, Megatron's process groups and random states are those of `config`; afterwards they are gone.

    Every group gets the timeout that the default group has. ValueError without an initialised torch.distributed, if
    its processes do not fit the configuration, or if a CPU run is asked of a process that sees a GPU (Megatron would
    use the GPU).
    """
    if not dist.is_initialized():
        raise Refused(
            "torch.distributed is not initialised, so this process knows no other rank; "
            "call torch.distributed.init_process_group before train, as the launchers do (one process is fine)"
        )
    config.data_parallel_size(dist.get_world_size())
    if device.type == "cpu" and torch.cuda.is_available():
        raise Refused(
            "device=cpu was asked of a process that sees a GPU, where Megatron-core would put its buffers all the "
            "same; hide the GPU from it with CUDA_VISIBLE_DEVICES='' or train on cuda"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timeout_of(dist.group.WORLD)
    with megatron_on_cpu():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
            context_parallel_size=config.parallel.context_parallel_size,
            distributed_timeout_minutes=timeout.total_seconds() / 60,  # a fraction of one, too
        )
        try:
            for group in groups_of_this_rank():
                set_timeout(group, timeout)  # Megatron forgets the gloo twin of the experts' replicas
            _seed(config.run.seed)
            yield _this_process(config, device)
        except BaseException:
            parallel_state.destroy_model_parallel()  # closing a group may wait for a rank that is gone
            raise
        _close_groups()


def _close_groups() -> None:
    """Megatron forgets its process groups without closing them; over gloo each leaves busy threads behind."""
    groups = getattr(parallel_state, "_global_process_group_list", None) or []
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None:  # None stands for the default group, which belongs to the launcher
            with suppress(ValueError):  # over gloo Megatron's twin of a group is closed with it
                dist.destroy_process_group(group)


def _seed(seed: int) -> None:
    """Stages of a pipeline hold different layers and so draw different numbers."""
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def _transport(config: TrainConfig, cp: Comm, device: torch.device) -> Transport:
    """That of the context-parallel groups."""
    if cp.group is None or cp.size == 1:
        return Transport("alone")
    try:
        return transport_of(cp.group, config.parallel.fetch_options(), device)
    except ValueError as error:
        raise Refused(f"parallel.{error}") from error


def _this_process(config: TrainConfig, device: torch.device) -> World:
    cp = Comm(parallel_state.get_context_parallel_group())
    return World(
        device=device,
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp=cp,
        transport=_transport(config, cp, device),
    )
