"""How evenly the experts of each layer were taken in a step.

load_balancing_loss     the mean over samples, and over layers, of what `SampleRouter` says; near 1 is even.
                        It is no part of any other loss that is recorded
busiest                 tokens of the expert that takes most, over the mean of its layer's; of all layers the largest
least                   the same of the expert that takes fewest: 0 for one that nobody takes
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.train.data.batches import Batch, BatchCutter
from nsa_dist.train.experts.router import SampleRouter, SampleTokens
from nsa_dist.train.files.records import Record
from nsa_dist.train.model import Trainable


@dataclass(frozen=True)
class Balance:
    """Tells the routers of this stage which tokens are whose in a step, and adds up what they saw."""

    cutter: BatchCutter
    routers: dict[int, SampleRouter]  # by layer from 0

    @classmethod
    def begun(cls, model: Trainable, cutter: BatchCutter) -> "Balance":
        """For one step."""
        for router in model.routers.values():
            router.start_counting()
        return cls(cutter, model.routers)

    def telling(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches, each told of when it is asked for, which is right before its forward."""
        for batch in batches:
            if self.routers:
                tokens = self._tokens(batch)
                for router in self.routers.values():
                    router.tokens = tokens
            yield batch

    def pack(self) -> Tensor:
        """This rank's table [layers, num_experts + 1], flattened, fp64; empty for a model without experts."""
        model = self.cutter.config.model
        num_layers = model.num_layers + model.num_mtp_layers
        columns, device = (model.num_experts or -1) + 1, self.cutter.world.device
        table = torch.zeros(num_layers, columns, dtype=torch.float64, device=device)
        for layer, router in self.routers.items():
            table[layer] = router.seen
        return table.flatten()

    def _tokens(self, batch: Batch) -> SampleTokens:
        run, rank = self.cutter.config.run, self.cutter.world.cp.rank
        rows, length = run.micro_batch_size, run.sequence_length
        if batch.pack is None:
            sample = torch.arange(rows).repeat(batch.tokens.shape[1])
        else:
            sample = batch.pack.shard(torch.arange(rows * length) // length + 1, rank) - 1
        return SampleTokens(sample.to(self.cutter.world.device, non_blocking=True), rows, length)


def record(cutter: BatchCutter, step: int, summed: Sequence[float]) -> Record:
    """The "experts" record of a step from the sum of all ranks' tables."""
    model = cutter.config.model
    table = torch.tensor(summed, dtype=torch.float64).view(model.num_layers + model.num_mtp_layers, -1)
    layers = {
        str(layer + 1): _layer(table[layer].tolist(), cutter.config.run.global_batch_size)
        for layer, has_experts in enumerate(model.with_mtp(model.layers_with_experts))
        if has_experts
    }
    losses = [layer["load_balancing_loss"] for layer in layers.values()]
    return {
        "kind": "experts",
        "step": step,
        "load_balancing_loss": sum(losses) / len(losses),
        "busiest": max(layer["busiest"] for layer in layers.values()),
        "least": min(layer["least"] for layer in layers.values()),
        "layers": layers,
    }


def _layer(row: list[float], num_samples: int) -> dict[str, float]:
    *counts, loss = row
    mean = sum(counts) / len(counts)
    return {"load_balancing_loss": loss / num_samples, "busiest": max(counts) / mean, "least": min(counts) / mean}
