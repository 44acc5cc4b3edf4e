"""Packed documents as the kernels see them: which compressed rows each token sees, and where it lies."""

from typing import NamedTuple

import torch
from torch import Tensor


class Pack(NamedTuple):
    begin: Tensor  # int32 [T], compressed rows [begin, end) of each token
    end: Tensor
    position: Tensor  # [T] in the stream padded to selection blocks, -1: padding
    doc_start: Tensor  # [T]
    num_blocks: int  # M

    def to(self, device: torch.device) -> "Pack":
        return Pack(*(t.to(device) for t in self[:4]), self.num_blocks)


def pack(doc_lens: list[int], block_len: int = 32, stride: int = 16, slc_block_len: int = 64) -> Pack:
    """Documents one after another, each padded to whole selection blocks; padding sees no compressed row.

    >>> p = pack([40], block_len=32, stride=8, slc_block_len=48)
    >>> p.end.tolist()[30:], p.position.tolist()[38:42]
    ([0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2], [38, 39, -1, -1])
    """
    begin, end, position, doc_start = [], [], [], []
    rows = stream = 0
    for length in doc_lens:
        num_blocks = max(0, (length - block_len) // stride + 1)
        padded = -(-length // slc_block_len) * slc_block_len
        for t in range(padded):
            real = t < length
            seen = min(num_blocks, max(0, (t - block_len + 1) // stride + 1)) if real else num_blocks
            begin.append(rows if real else rows + num_blocks)
            end.append(rows + seen)
            position.append(stream + t if real else -1)
            doc_start.append(stream)
        rows += num_blocks
        stream += padded
    int32 = (torch.tensor(x, dtype=torch.int32) for x in (begin, end))
    return Pack(*int32, torch.tensor(position), torch.tensor(doc_start), rows)
