"""The index of which queries chose each block: against its worked example and a plain stable sort."""

from itertools import accumulate, pairwise

import torch

from nsa_kernels.selected.index import build_block_index


def test_index_of_the_docstring(device):
    block_indices = torch.tensor([[[0, -1]], [[0, 1]], [[0, 2]], [[1, 2]]], dtype=torch.int32, device=device)
    position = torch.full((4,), 1000, device=device)
    index = build_block_index(
        block_indices, position, num_blocks=4, slc_block_len=64, item_queries=2, segment_queries=256, gather_all=True
    )
    assert index.entries[:7].tolist() == [0, 2, 4, 3, 6, 5, 7]
    assert index.offsets.tolist() == [0, 3, 5, 7, 7]
    assert index.item_offsets.tolist() == [0, 2, 3, 4, 4]
    assert index.item_list[:4].tolist() == [0, 0, 1, 2]
    assert index.max_items == 8


def test_index_over_many_words_and_segments(device):
    """More queries than a group of bits, three segments: against a plain stable sort."""
    num_queries, heads, blocks, slots, segment_queries = 700, 2, 5, 3, 256
    chosen = torch.rand(num_queries, heads, blocks).argsort(-1)[..., :slots].sort(-1).values
    keep = torch.rand(num_queries, heads, 1) < 0.9
    block_indices = torch.where(keep, chosen, -1).to(torch.int32)
    position = torch.full((num_queries,), 10_000)
    index = build_block_index(
        block_indices.to(device), position.to(device),
        num_blocks=blocks, slc_block_len=16, item_queries=7, segment_queries=segment_queries, gather_all=True,
    )  # fmt: skip
    want, offsets = [], [0]
    for first in range(0, num_queries, segment_queries):
        for h in range(heads):
            for block in range(blocks):
                here = (block_indices[first : first + segment_queries, h] == block).nonzero()
                want += [(first + t) * slots + i for t, i in here.tolist()]
                offsets.append(len(want))
    assert index.offsets.tolist() == offsets
    assert index.entries[: len(want)].tolist() == want
    items = [-(-(end - begin) // 7) for begin, end in pairwise(offsets)]
    assert index.item_offsets.tolist() == [0, *accumulate(items)]
    assert index.item_list[: sum(items)].tolist() == [which for which, n in enumerate(items) for _ in range(n)]
