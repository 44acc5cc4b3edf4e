"""What the layers of multi-token prediction are to predict, found on whole samples before these are cut over ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = ("mtp_labels", "mtp_loss_mask")


def predicted(sample: Mapping[str, Tensor], num_depths: int) -> dict[str, Tensor]:
    """{"mtp_labels" int64, "mtp_loss_mask"}, both [N, depths], of a sample of N tokens.

        labels[i, k - 1] = the label of token i + k, which is token i + k + 1      k = 1, ..., depths
        mask[i, k - 1]   = what that label weighs

    Both 0 where token i + k is of another document (by "cu_seqlens") or behind the sample: what is known there is not
    what follows on token i, or is not known.
    """
    rows, bounds = (sample["labels"], sample["loss_mask"]), sample["cu_seqlens"]
    length = len(rows[0])
    found = [row.new_zeros(length, num_depths) for row in rows]
    ends = bounds[1:].repeat_interleave(bounds.diff())  # of the document of each token
    for depth in range(1, min(num_depths, length - 1) + 1):
        is_here = torch.arange(depth, length) < ends[: length - depth]
        for moved, row in zip(found, rows, strict=True):
            moved[: length - depth, depth - 1] = row[depth:] * is_here
    return dict(zip(NAMES, found, strict=True))


def joined(one: Tensor, others: Tensor) -> Tensor:
    """[b, T] of the next token and [b, T, depths] of those behind it -> [b, T, 1 + depths]."""
    return torch.cat([one[..., None], others], -1)
