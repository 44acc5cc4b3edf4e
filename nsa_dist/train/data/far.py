"""What the far context of a document is worth: samples in which its end alone counts, as they are and scrambled.

Of a document with at least 3 x `kept` tokens in a sample the last `kept` are judged, the `kept` before them stay, and
all that is further back is put in another order, or left for comparison. The loss of the same tokens after both says
what the model takes from there: its order, for the tokens themselves are still there.
"""

import torch
from torch import Tensor

from nsa_dist.train.data.samples import SampleSource


class FarContext:
    """`samples`, a source of the same length, with the loss of judged tokens alone. Sample n scrambles alike always."""

    def __init__(self, samples: SampleSource, kept: int, scrambled: bool) -> None:
        self._samples, self._kept, self._scrambled = samples, kept, scrambled

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        sample = self._samples[n]
        tokens, labels, mask = sample["tokens"].clone(), sample["labels"].clone(), torch.zeros_like(sample["loss_mask"])
        generator = torch.Generator().manual_seed(n)
        for begin, end in zip(*(sample["cu_seqlens"].tolist()[i:] for i in (0, 1)), strict=False):
            if end - begin < 3 * self._kept:
                continue
            mask[end - self._kept : end] = sample["loss_mask"][end - self._kept : end]
            if self._scrambled:
                far = slice(begin, end - 2 * self._kept)
                order = begin + torch.randperm(far.stop - begin, generator=generator)
                tokens[far] = sample["tokens"][order]
                labels[begin : far.stop - 1] = tokens[begin + 1 : far.stop]
                if begin:
                    labels[begin - 1] = tokens[begin]
        return {**sample, "tokens": tokens, "labels": labels, "loss_mask": mask}
