"""What is looked at every `run.health_interval` steps, and every `run.replica_check_interval`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.batches import BatchCutter
from nsa_dist.train.files.records import Record
from nsa_dist.train.health.attention import AttentionMeter
from nsa_dist.train.health.record import work_record
from nsa_dist.train.health.replicas import mismatch
from nsa_dist.train.health.work import Work
from nsa_dist.train.model import Trainable
from nsa_dist.train.world import World


@dataclass
class Monitor:
    """Of one run. Steps in between cost nothing."""

    config: TrainConfig
    world: World
    model: Trainable
    cutter: BatchCutter
    work: Work = field(init=False)
    attention: AttentionMeter = field(init=False)

    def __post_init__(self) -> None:
        self.work = Work(self.world.device)
        self.attention = AttentionMeter(self.config, self.cutter.plan, self.world)

    def is_due(self, step: int) -> bool:
        return step % self.config.run.health_interval == 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around the step, on every process."""
        if not self.is_due(step):
            yield
            return
        self.work = Work(self.world.device)
        with self.attention.watching(self.model), self.work.measured():
            yield

    def record(self, step: int) -> Record:
        """Of the step that was watched last. Called on every process."""
        seconds, peaks = zip(*self.world.gathered([self.work.work_s, self._peak_bytes()]), strict=True)
        memory = {"peak_bytes": list(peaks)} if self.world.device.type == "cuda" else {}
        layers = self.attention.record(self.model)
        return {"kind": "health", "step": step, **work_record(seconds), **memory, "layers": layers}

    def drift(self, step: int) -> str:
        """Why the run cannot go on after `step`, if its replicas are no longer the same; "" if all is well."""
        if step % self.config.run.replica_check_interval:
            return ""
        found = mismatch(self.model, self.world)
        return found and (
            f"after step {step} replicas of the weights are no longer the same: {found}. What these ranks computed "
            f"cannot be trusted: look at their devices (topology.json names them), and go on from the last checkpoint"
        )

    def _peak_bytes(self) -> int:
        is_cuda = self.world.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.world.device) if is_cuda else 0
