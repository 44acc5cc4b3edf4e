"""The samples of a task: sample n is drawn from the seed, the split and n, and no other sample or state.

A drawn text is `length` bytes at the beginning of the row, zeros fill it up, which no byte before them sees. Under
`data.documents=packed` as many texts of that length as fit stand in the row, each a document of its own. Answers alone
weigh in the loss: what they follow from was drawn and cannot be learnt. Each weighs `sequence_length // (bytes of
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
    packed      texts fill the row, and do not see each other
    split       "train" or "validation": no sample of one is drawn as one of the other
    """

    task: str
    lengths: Sequence[int]
    sequence_length: int
    seed: int
    split: str
    packed: bool = False

    def texts(self, n: int) -> dict[int, Drawn]:
        """Those of sample `n` and their answers, by their places in the row; all have one length."""
        rng = _generator(f"{self.task} {n} of {self.split}, seed {self.seed}")
        length = self.lengths[rng.randint(len(self.lengths))]
        number = self.sequence_length // length if self.packed else 1
        return {i * length: TASKS[self.task](rng, length) for i in range(number)}

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        row = np.full(self.sequence_length + 1, END_OF_DOCUMENT, dtype=np.int64)
        weights = np.zeros(self.sequence_length, dtype=np.float32)
        texts = self.texts(n)
        for start, drawn in texts.items():
            row[start : start + len(drawn.text)] = np.frombuffer(drawn.text, dtype=np.uint8)
            for answer in drawn.answers:
                weights[start + answer.start - 1 : start + answer.stop - 1] = 1  # a label stands one before its token
        weights *= self.sequence_length // int(weights.sum())
        bounds = torch.tensor([*texts, self.sequence_length])
        return {
            "tokens": torch.from_numpy(row[:-1]),
            "labels": torch.from_numpy(row[1:]),
            "loss_mask": torch.from_numpy(weights),
            "position_ids": torch.arange(self.sequence_length) - bounds[:-1].repeat_interleave(bounds.diff()),
            "cu_seqlens": bounds,
        }


def training_samples(config: TrainConfig) -> list[tuple[float, TaskSamples]]:
    """(share of the run's samples, source) of each task."""
    run = config.run
    return [
        (share, TaskSamples(task, config.task_lengths, run.sequence_length, run.seed, "train", config.data.is_packed))
        for task, share in config.data.tasks.items()
    ]


def held_out_samples(config: TrainConfig, task: str, length: int) -> TaskSamples:
    """What a task is evaluated on at one length: the same samples at every evaluation."""
    run = config.run
    return TaskSamples(task, (length,), run.sequence_length, run.seed, "validation", config.data.is_packed)


def _generator(name: str) -> np.random.RandomState:
    """Whose numbers numpy keeps for good."""
    return np.random.RandomState(np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4"))
