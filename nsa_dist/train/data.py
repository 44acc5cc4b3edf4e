"""Samples by index, and the batch of a step cut for one rank."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from nsa_dist.cp.plan import ShardPlan
from nsa_dist.train.config import VOCAB_SIZE, TrainConfig
from nsa_dist.train.corpus import END_OF_DOCUMENT, SPLITS, write_corpus
from nsa_dist.train.world import World

Batch = dict[str, Tensor]


class ByteTokenizer:
    """What Megatron's datasets ask of a tokenizer."""

    vocab_size = VOCAB_SIZE
    eod = END_OF_DOCUMENT
    pad = -1  # no such token: every sample is full
    unique_identifiers: ClassVar = OrderedDict(tokenizer="bytes")


@dataclass(frozen=True)
class Datasets:
    """Megatron's datasets of one run: each sample is `sequence_length` consecutive tokens of shuffled files."""

    train: GPTDataset
    validation: GPTDataset


def build_datasets(config: TrainConfig, folder: Path, world: World) -> Datasets:
    """Read `folder`; process 0 writes the corpus there first if it is not there yet. Called on every process."""
    if world.is_main:
        write_corpus(config.data, folder)
    world.barrier()
    run = config.run
    dataset_config = GPTDatasetConfig(
        random_seed=run.seed,
        sequence_length=run.sequence_length,
        blend_per_split=[*(([str(folder / split)], None) for split in SPLITS), None],
        path_to_cache=str(folder / "index"),
        tokenizer=ByteTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    num_samples = [run.steps * run.global_batch_size, run.eval_batches * run.global_batch_size, 0]
    train, validation, _ = BlendedMegatronDatasetBuilder(GPTDataset, num_samples, lambda: True, dataset_config).build()
    return Datasets(train, validation)


@dataclass(frozen=True)
class BatchCutter:
    """Deals a global batch out to replicas, and each sequence to context-parallel ranks by the plan.

    Sample i of a step goes to micro-batch i // (dp_size * micro_batch_size), so which samples a step sees does not
    depend on how many replicas there are.
    """

    config: TrainConfig
    world: World
    plan: ShardPlan

    @property
    def num_micro_batches(self) -> int:
        return self.config.run.global_batch_size // (self.config.run.micro_batch_size * self.world.dp_size)

    def micro_batches(self, dataset: GPTDataset, batch_index: int) -> Iterator[Batch]:
        """This rank's micro-batches of global batch `batch_index`: tensors [micro_batch_size, tokens_per_rank]."""
        size = self.config.run.micro_batch_size
        first = batch_index * self.config.run.global_batch_size + self.world.dp_rank * size
        for micro in range(self.num_micro_batches):
            start = first + micro * self.world.dp_size * size
            yield self._cut([dataset[i] for i in range(start, start + size)])

    def _cut(self, samples: list[Batch]) -> Batch:
        return {
            name: torch.stack([self.plan.shard(sample[name], self.world.cp.rank) for sample in samples]).to(
                self.world.device, non_blocking=True
            )
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        }


def sequence_plan(config: TrainConfig) -> ShardPlan:
    """How one sequence of the run is cut: a single document over its whole length."""
    make = ShardPlan.zigzag if config.parallel.layout == "zigzag" else ShardPlan.contiguous
    return make([0, config.run.sequence_length], config.parallel.context_parallel_size, config.nsa.slc_block_len)
