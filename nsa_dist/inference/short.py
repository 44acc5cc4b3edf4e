"""The short way (`nsa_dist.cp.short`) of the queries of a prefill, whose keys lie in pages of the cache."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from nsa_dist.config import NSAConfig
from nsa_dist.cp.plan import runs
from nsa_dist.cp.short import QueryBlocks, short_option, short_rows_of
from nsa_dist.inference.cache import SequenceState
from nsa_dist.inference.places import Places


def short_prefill(
    states: Sequence[SequenceState], added: Sequence[int], at: Places, cfg: NSAConfig, ops: ModuleType
) -> dict[str, Any]:
    """The option of selected attention for query rows that begin and end at whole blocks, as training's do."""
    length = cfg.slc_block_len
    start, count = torch.tensor([state.length for state in states]), torch.tensor(added)
    end = start + count
    num_blocks = torch.where(count > 0, (end + length - 1) // length - start // length, 0)
    num_pages = torch.tensor([len(state.pages) for state in states])
    sequence = torch.arange(len(states)).repeat_interleave(num_blocks)
    number = runs(start // length, num_blocks)
    position = number[:, None] * length + torch.arange(length)
    visible = (position >= start[sequence, None]) & (position < end[sequence, None])
    first_block = (num_pages.cumsum(0) - num_pages)[sequence]
    queries = QueryBlocks(sequence, first_block, number, visible)
    return short_option(short_rows_of(queries, at.position, cfg, ops))
