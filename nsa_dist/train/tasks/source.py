"""The samples of a task: sample n is drawn from the seed, the split and n, and no other sample or state.

A drawn text is `length` bytes at the beginning of the row, zeros fill it up, which no byte before them sees. Answers
alone weigh in the loss: what they follow from was drawn and cannot be learnt. Each weighs `sequence_length // (bytes of
all answers)`, so that a sample of a task weighs as much as one of text, to rounding; a whole number, so that sums over
ranks are exact.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nsa_dist.train.config import END_OF_DOCUMENT, TrainConfig
from nsa_dist.train.tasks.drawing import Drawn
from nsa_dist.train.tasks.kinds import TASKS


@dataclass(frozen=True)
class TaskSamples:
    """`samples[n]` for n = 0, 1, 2, ... without an end: as `nsa_dist.train.data.samples.Samples`.

    lengths     bytes of a text, drawn among these
    split       "train" or "validation": no sample of one is drawn as one of the other
    """

    task: str
    lengths: Sequence[int]
    sequence_length: int
    seed: int
    split: str

    def drawn(self, n: int) -> Drawn:
        """The text of sample `n` and its answers."""
        rng = _generator(f"{self.task} {n} of {self.split}, seed {self.seed}")
        return TASKS[self.task](rng, self.lengths[rng.randint(len(self.lengths))])

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        drawn = self.drawn(n)
        row = np.full(self.sequence_length + 1, END_OF_DOCUMENT, dtype=np.int64)
        row[: len(drawn.text)] = np.frombuffer(drawn.text, dtype=np.uint8)
        weight = self.sequence_length // sum(answer.stop - answer.start for answer in drawn.answers)
        weights = torch.zeros(self.sequence_length)
        for answer in drawn.answers:
            weights[answer.start - 1 : answer.stop - 1] = weight  # a label stands one before its token
        return {
            "tokens": torch.from_numpy(row[:-1]),
            "labels": torch.from_numpy(row[1:]),
            "loss_mask": weights,
            "position_ids": torch.arange(self.sequence_length),
            "cu_seqlens": torch.tensor([0, self.sequence_length]),
        }


def training_samples(config: TrainConfig) -> list[tuple[float, TaskSamples]]:
    """(share of the run's samples, source) of each task."""
    run = config.run
    return [
        (share, TaskSamples(task, config.task_lengths, run.sequence_length, run.seed, "train"))
        for task, share in config.data.tasks.items()
    ]


def held_out_samples(config: TrainConfig, task: str, length: int) -> TaskSamples:
    """What a task is evaluated on at one length: the same samples at every evaluation."""
    return TaskSamples(task, (length,), config.run.sequence_length, config.run.seed, "validation")


def _generator(name: str) -> np.random.RandomState:
    """Whose numbers numpy keeps for good."""
    return np.random.RandomState(np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4"))
