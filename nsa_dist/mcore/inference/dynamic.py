"""A dynamic inference context: requests of any lengths, each a sequence of an `NSACache` kept with it for each layer.

Megatron's own layers write keys and values into blocks of `context.memory_buffer`; NSA layers leave that alone and keep
a `RequestCache` each in `context.nsa_layers`. The context says what a step is, by its active requests in a row: their
ids, how many tokens each adds (`request_query_lengths`) behind how many (`request_kv_length_offsets`). A request that
begins at 0 is begun anew, as one that was evicted is read again; one that is no longer named is freed.

Rows behind the active tokens are padding, and what is returned for them is 0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_dist.branches import BranchKV
from nsa_dist.inference.attend import nsa_decode, nsa_prefill
from nsa_dist.inference.cache import NSACache


class Step(NamedTuple):
    """The active requests of a step, in the order of their tokens; of a context on a GPU the host waits for them."""

    ids: list[int]
    offsets: list[int]
    lengths: list[int]
    held: set[int]  # ids of all requests that the context still knows

    @classmethod
    def of(cls, context: Any) -> "Step":
        active = slice(int(context.paused_request_count), int(context.total_request_count))
        books = context.request_ids, context.request_kv_length_offsets, context.request_query_lengths
        ids, offsets, lengths = torch.stack([x[active] for x in books]).tolist()
        paused = context.request_ids[: active.start].tolist()
        return cls(ids, offsets, lengths, {*paused, *ids, int(context.chunked_prefill_request_id)})

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [num_tokens], each token's place in its request."""
        ranges = [
            torch.arange(offset, offset + count) for offset, count in zip(self.offsets, self.lengths, strict=True)
        ]
        return torch.cat(ranges).to(device)


class RequestCache:
    """What a context keeps of one layer."""

    def __init__(self, cache: NSACache) -> None:
        self.cache = cache
        self._seqs: dict[int, int] = {}

    def sequences(self, step: Step) -> list[int]:
        """Those of the active requests, each as long as its offset. ValueError for tokens that were never here."""
        for request in self._seqs.keys() - step.held:
            self.cache.free(self._seqs.pop(request))
        return [self._at(request, offset) for request, offset in zip(step.ids, step.offsets, strict=True)]

    def _at(self, request: int, offset: int) -> int:
        length = self.cache.length(self._seqs[request]) if request in self._seqs else 0
        if offset == 0 < length:
            self.cache.free(self._seqs.pop(request))
        elif offset != length:
            raise ValueError(
                f"request {request} goes on behind {offset} tokens, but the cache has {length} of it: others would be "
                f"missing, or be there twice; call the layer for every step of the context, with "
                f"enable_prefix_caching=False and num_speculative_tokens=0"
            )
        if request not in self._seqs:
            self._seqs[request] = self.cache.new_sequence()
        return self._seqs[request]


def check_dynamic(context: Any, attention_mask: Tensor | None, num_rows: int, num_samples: int, who: str) -> None:
    """ValueError for steps that the layer does not take."""
    kind = type(context).__name__
    names = {
        "enable_prefix_caching": "blocks that requests share are those of the dense buffer; set it to False",
        "num_speculative_tokens": "which of them were rejected is not followed; set it to 0",
        "is_hybrid_model": "it was not tried beside Mamba layers; leave mamba_inference_state_config out",
        "cache_mla_latent": "NSA has no latent keys and values; set it to False",
    }
    for name, why in names.items():
        if value := getattr(context, name, False):
            raise ValueError(f"{who} was given a {kind} with {name}={value}, which it does not support: {why}")
    if context.using_cuda_graph_this_step():
        raise ValueError(
            f"{who} was given a {kind} that replays CUDA graphs, but requests are found on the host in every "
            f"step; make it with num_cuda_graphs=None"
        )
    if attention_mask is not None or num_samples != 1 or num_rows < int(context.active_token_count):
        mask = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(
            f"{who} was given [{num_rows}, {num_samples}] tokens and attention_mask {mask}, but a {kind} has "
            f"{int(context.active_token_count)} active tokens in one row, causal in each request; pass "
            f"context.current_input_and_position_ids() and no mask"
        )


def request_cache(context: Any, layer_number: int) -> RequestCache | None:
    """What the context keeps of a layer, if it does already."""
    return vars(context).setdefault("nsa_layers", {}).get(layer_number)


def pages_for(context: Any, slc_block_len: int) -> int:
    """As many as all blocks of the context have tokens for, so it is the context that is full first."""
    allocator = getattr(context, "kv_block_allocator", None) or context.block_allocator  # 0.19, 0.16
    return int(allocator.total_count) * -(-int(context.block_size_tokens) // slc_block_len)


def attend_requests(
    q: Tensor, kv: BranchKV, gates: Tensor, layer: RequestCache, step: Step, softmax_scale: float | None
) -> Tensor:
    """New tokens of each request behind what the cache has: q [T, Hq, Dk] and the others alike -> [T, Hq, Dv]."""
    seqs = layer.sequences(step)
    if max(step.lengths) == 1 and min(step.offsets) > 0:
        pairs = BranchKV(*(x[:, None] for x in kv))
        out = nsa_decode(q[:, None], pairs, gates[:, None], layer.cache, seqs, softmax_scale=softmax_scale)
        assert isinstance(out, Tensor)
        return out[:, 0]
    bounds = torch.tensor([0, *step.lengths]).cumsum(0)
    out = nsa_prefill(q, kv, gates, layer.cache, seqs, cu_seqlens=bounds, softmax_scale=softmax_scale)
    assert isinstance(out, Tensor)
    return out
