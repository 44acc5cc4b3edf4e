"""What the layers of multi-token prediction are to predict, found on whole samples before these are cut over ranks."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor


def predicted(sample: Mapping[str, Tensor], num_depths: int) -> dict[str, Tensor]:
    """{"mtp_labels" int64, "mtp_loss_mask"}, both [N, depths], of a sample of N tokens.

        labels[i, k - 1] = the label of token i + k, which is token i + k + 1      k = 1, ..., depths
        mask[i, k - 1]   = what that label weighs

    Both 0 where token i + k is of another document (by "cu_seqlens") or behind the sample: what is known there is not
    what follows on token i, or is not known.
    """
    labels, mask = sample["labels"], sample["loss_mask"]
    found = labels.new_zeros(len(labels), num_depths), mask.new_zeros(len(mask), num_depths)
    for start, end in pairwise(sample["cu_seqlens"].tolist()):
        for depth in range(1, min(num_depths, end - start - 1) + 1):
            for moved, row in zip(found, (labels, mask), strict=True):
                moved[start : end - depth, depth - 1] = row[start + depth : end]
    return dict(zip(NAMES, found, strict=True))


NAMES = ("mtp_labels", "mtp_loss_mask")


def joined(one: Tensor, others: Tensor) -> Tensor:
    """[b, T] of the next token and [b, T, depths] of those behind it -> [b, T, 1 + depths]."""
    return torch.cat([one[..., None], others], -1)
