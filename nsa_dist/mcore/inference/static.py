"""A static inference context: rows of one length, each a sequence of an `NSACache` that the context keeps a layer.

Megatron's own layers keep keys and values [max_sequence_length, max_batch_size, Hkv, D] in
`context.key_value_memory_dict[layer_number]`; here lies a `LayerCache` there. The context says where a step stands,
`sequence_len_offset` and `batch_size_offset`; at the beginning a row is begun anew, as dense memory is overwritten.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from nsa_dist.branches import BranchKV
from nsa_dist.inference.attend import nsa_decode, nsa_prefill
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.storage import MOST_BACK


class LayerCache:
    """What a context keeps of one layer: pages for `max_batch_size` sequences of `max_sequence_length` tokens.

    cache       empty, with as many pages
    num_rows    max_batch_size
    """

    def __init__(self, cache: NSACache, num_rows: int) -> None:
        self.cache = cache
        self._seqs = [cache.new_sequence() for _ in range(num_rows)]

    def rows(self, first: int, count: int, offset: int) -> list[int]:
        """The sequences of rows [first, first + count), each `offset` tokens long.

        ValueError for rows there are not, for a gap behind what is there, and for going back by more than rings hold,
        unless to the beginning.
        """
        if first + count > len(self._seqs):
            raise ValueError(
                f"the batch has rows {first} to {first + count - 1}, but the context was made for {len(self._seqs)}: "
                f"their pages are made at once; make it with max_batch_size={first + count}"
            )
        for row in range(first, first + count):
            self._go_to(row, offset)
        return self._seqs[first : first + count]

    def _go_to(self, row: int, offset: int) -> None:
        length = self.cache.length(self._seqs[row])
        if offset > length:
            raise ValueError(
                f"sequence_len_offset={offset} is behind the {length} tokens that row {row} has: what lies between is "
                f"missing from the cache; call the layer with every token in turn, or reset the context to 0"
            )
        if offset == 0 < length:
            self.cache.free(self._seqs[row])
            self._seqs[row] = self.cache.new_sequence()
        elif offset < length:
            self.cache.truncate(self._seqs[row], offset)

    def __iter__(self) -> Iterator[NoReturn]:
        raise ValueError(
            "swap_key_value_dict was called on a context with NSA layers, whose cache is no pair of tensors to index; "
            "use nsa_dist.inference.model.GPT, whose sequences fork, for beams"
        )


def check_context(context: Any, training: bool, cp_size: int, who: str) -> None:
    """ValueError for calls in which a context, static or dynamic, would mean nothing."""
    kind = type(context).__name__
    if training:
        raise ValueError(
            f"{who} was given a {kind} while it trains, and a cache has no gradient; call model.eval() first, or leave "
            f"the context out"
        )
    if cp_size > 1:
        raise ValueError(
            f"{who} was given a {kind} over {cp_size} context-parallel ranks, but a context says where whole sequences "
            f"are; build the model with context_parallel_size=1, or use nsa_prefill and nsa_decode with cp_group"
        )


def attend(
    q: Tensor, kv: BranchKV, gates: Tensor, layer: LayerCache, seqs: list[int], softmax_scale: float | None
) -> Tensor:
    """New tokens of each row behind what the cache has: q [b, s, Hq, Dk] and the others alike -> [b, s, Hq, Dv]."""
    rows, tokens = q.shape[:2]
    if tokens <= MOST_BACK and layer.cache.length(seqs[0]):
        out = nsa_decode(q, kv, gates, layer.cache, seqs, softmax_scale=softmax_scale)
    else:
        packed = [x.flatten(0, 1) for x in (q, *kv, gates)]
        bounds = torch.arange(rows + 1) * tokens
        out = nsa_prefill(
            packed[0], BranchKV(*packed[1:7]), packed[7], layer.cache, seqs, cu_seqlens=bounds,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        out = out.unflatten(0, (rows, tokens))
    assert isinstance(out, Tensor)
    return out
