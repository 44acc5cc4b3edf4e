"""The samples of a corpus in the order in which a run sees them.

The documents, shuffled once, are one stream of tokens, cut into samples of `sequence_length` tokens and the one after
them; a stream that is too short for one goes on at its beginning, and so does the last label. Every epoch visits each
sample once, in an order of its own. Sample n is a function of (corpus, sequence_length, seed, n) and of nothing else,
so the number of samples consumed is the whole position in the data, whatever batches, ranks and steps there were.

Packed samples are the same tokens and know where documents begin in them: positions start over there, and the label of
a document's last token, which is the next document's first, weighs nothing.
"""

import hashlib
from functools import cached_property, lru_cache
from typing import ClassVar, Protocol

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor


class SampleSource(Protocol):
    """What batches are cut from: `Samples`, or several of them blended."""

    def __getitem__(self, n: int, /) -> dict[str, Tensor]: ...


class Samples:
    """`samples[n]` for n = 0, 1, 2, ... without an end: mappings of `names`, tensors [sequence_length].

    And "cu_seqlens", int64 [num_docs + 1]: the bounds of what is to be kept apart, of one piece unless `packed`.
    """

    names: ClassVar = ("tokens", "labels", "loss_mask", "position_ids")

    def __init__(
        self,
        documents: IndexedDataset,
        sequence_length: int,
        seed: int,
        chosen: np.ndarray | None = None,
        packed: bool = False,
    ) -> None:
        """`chosen` are the numbers of the documents to take; None: all."""
        self._documents = documents
        self._length = sequence_length
        self._seed = seed
        self._packed = packed
        chosen = np.arange(len(documents)) if chosen is None else chosen
        self._shuffled = chosen[_permutation(len(chosen), f"documents of seed {seed}")]
        lengths = np.asarray(documents.sequence_lengths, dtype=np.int64)[self._shuffled]
        self._ends = np.cumsum(lengths)  # in the stream, of each document
        self._order_of_epoch = lru_cache(maxsize=2)(self._order)  # a batch may lie in two of them

    @property
    def num_tokens(self) -> int:
        """Of the stream."""
        return int(self._ends[-1])

    @cached_property
    def per_epoch(self) -> int:
        """Whole samples in the stream, or 1."""
        return max(1, int(self._ends[-1]) // self._length)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        epoch, place = divmod(n, self.per_epoch)
        start = int(self._order_of_epoch(epoch)[place]) * self._length
        parts = self._read(start, self._length + 1)
        text = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        return {"tokens": text[:-1], "labels": text[1:], **self._bounded([len(part) for part in parts])}

    def _bounded(self, lengths: list[int]) -> dict[str, Tensor]:
        """What follows from the lengths of the documents' parts, the token after the sample counted."""
        length = self._length
        loss_mask, position, starts = torch.ones(length), torch.arange(length), torch.zeros(1, dtype=torch.int64)
        if self._packed:
            begins = torch.tensor(lengths).cumsum(0)[:-1]  # of each document but the first
            loss_mask[begins - 1] = 0
            starts = torch.cat([starts, begins[begins < length]])
            position -= starts.repeat_interleave(torch.cat([starts, torch.tensor([length])]).diff())
        return {
            "loss_mask": loss_mask,
            "position_ids": position,
            "cu_seqlens": torch.cat([starts, torch.tensor([length])]),
        }

    def _order(self, epoch: int) -> np.ndarray:
        return _permutation(self.per_epoch, f"epoch {epoch} of seed {self._seed}")

    def _read(self, start: int, count: int) -> list[np.ndarray]:
        """`count` tokens of the stream from `start` on, document by document."""
        parts: list[np.ndarray] = []
        position = start % int(self._ends[-1])
        index = int(np.searchsorted(self._ends, position, side="right"))
        while count > 0:
            left = min(int(self._ends[index]) - position, count)
            within = position - (int(self._ends[index - 1]) if index else 0)
            if left:
                parts.append(self._documents.get(int(self._shuffled[index]), offset=within, length=left))
            count, position, index = count - left, position + left, index + 1
            if index == len(self._ends):
                position, index = 0, 0
        return parts


def split_documents(number: int, validation_fraction: float, name: str) -> dict[str, np.ndarray]:
    """{"train", "validation"}: sorted numbers of documents, one at least, none in both, drawn by `name`."""
    drawn = _permutation(number, f"split of {name}")
    num_validation = min(max(1, round(validation_fraction * number)), number - 1)
    return {"train": np.sort(drawn[num_validation:]), "validation": np.sort(drawn[:num_validation])}


def _permutation(size: int, name: str) -> np.ndarray:
    """Of `size` numbers, drawn by a generator whose numbers numpy keeps for good; `Generator`'s may change."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    return np.random.RandomState(words).permutation(size)
