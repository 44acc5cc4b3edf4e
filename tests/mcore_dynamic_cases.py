"""A layer and a model with Megatron's dynamic context: the real class, its tensors on the CPU, in an engine's loop.

The class asks `torch.cuda.current_device` where to put its tensors; here that answers with the CPU. Nothing else of it
is changed. `Engine` does what `DynamicInferenceEngine.schedule_chunked_prefill` and its steps do to a context.
"""

import inspect
import random
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.sampling_params import SamplingParams
from torch import Tensor

from mcore_cases import HIDDEN, SINGLE, VARIANTS, build_attention, expect_error, make_config
from mcore_model_cases import build, tokens
from nsa_dist.mcore.inference.dynamic import pages_for

LONGEST = 160
BLOCK = 16  # tokens of a block of the context
STEPS = 40


@contextmanager
def on_the_cpu():
    with mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")):
        yield


def context(config, num_blocks: int = 60, max_requests: int = 8, max_tokens: int = 64, **options):
    """Of Megatron-core 0.16 or 0.19; its own buffer has `num_blocks` blocks."""
    sizes = {
        "max_sequence_length": LONGEST, "block_size_tokens": BLOCK, "max_requests": max_requests,
        "max_tokens": max_tokens,
    }  # fmt: skip
    block_bytes = 2 * config.num_layers * BLOCK * config.num_query_groups * config.kv_channels * 8
    if "model_config" in inspect.signature(DynamicInferenceContext.__init__).parameters:
        from megatron.core.inference.config import InferenceConfig

        sizes |= {"buffer_size_gb": num_blocks * block_bytes / 2**30, "enable_chunked_prefill": True}
        return DynamicInferenceContext(config, InferenceConfig(**sizes, **options))
    return DynamicInferenceContext(
        params_dtype=torch.float64, num_layers=config.num_layers, kv_channels=config.kv_channels,
        num_attention_heads=config.num_query_groups, buffer_size_gb=num_blocks * block_bytes / 2**30, **sizes, **options
    )  # fmt: skip


class Engine:
    """Requests that come, are read in chunks, go on by a token a step, are paused, evicted, read again, and end.

    forward     of a step: what the layer or model says of the active tokens, [T, ...]
    said        by request and position: what was said of it, the last time
    """

    def __init__(self, at, forward: Callable[[], Tensor], seed: int) -> None:
        self.at, self.forward, self.rng = at, forward, random.Random(seed)
        self.waiting: list[DynamicInferenceRequest] = []
        self.said: dict[int, dict[int, Tensor]] = {}
        self.seen: set[str] = set()
        self._next = 0

    def run(self) -> None:
        for step in range(STEPS):
            if step < STEPS // 2 and self.rng.random() < 0.6:
                self.waiting.append(self._request(self._next, self.rng.randint(1, 100)))
                self._next += 1
            self._schedule()
            if self.at.active_token_count:
                self._step()

    def _request(self, request: int, length: int) -> DynamicInferenceRequest:
        parameters = SamplingParams(num_tokens_to_generate=LONGEST - length)
        return DynamicInferenceRequest(
            request_id=request, prompt_tokens=torch.zeros(length, dtype=torch.int64), sampling_params=parameters
        )

    def _schedule(self) -> None:
        at = self.at
        while self.waiting:
            head = self.waiting[0]
            goes_on = at.chunked_prefill_request_id >= 0
            has_place, _, has_blocks = at.check_availability(head)
            room = at.max_tokens - at.active_token_count
            if not (goes_on or has_place) or not has_blocks or room <= 0:
                return
            if len(head.remaining_prompt_tokens) <= room:
                at.chunked_prefill_request_id = -1
                at.add_request(head)
                head.remaining_prompt_tokens = head.remaining_prompt_tokens.new_empty(0)
                self.waiting.pop(0)
                continue
            self.seen.add("chunk")
            at.add_request(head, room)
            at.chunked_prefill_request_id = head.request_id
            head.remaining_prompt_tokens = head.remaining_prompt_tokens[room:]
            head.finished_chunk_token_count += room
            return

    def _step(self) -> None:
        at = self.at
        at.initialize_attention_state()
        found, first = self.forward(), 0
        active = slice(at.paused_request_count, at.total_request_count)
        ids, offsets, lengths = (
            x[active].tolist() for x in (at.request_ids, at.request_kv_length_offsets, at.request_query_lengths)
        )
        for request, offset, count in zip(ids, offsets, lengths, strict=True):
            rows = found[first : first + count]
            self.said.setdefault(request, {}).update({offset + i: row for i, row in enumerate(rows)})
            first += count
        self.seen.add("mixed" if max(lengths) > 1 and min(lengths) == 1 else "decode" if max(lengths) == 1 else "read")
        stays = [self.rng.random() < 0.95 and offset + count < LONGEST - 1
                 for offset, count in zip(offsets, lengths, strict=True)]  # fmt: skip
        self._update(ids, stays)

    def _update(self, ids: list[int], stays: list[bool]) -> None:
        at = self.at
        if at.chunked_prefill_request_id >= 0:
            stays[ids.index(at.chunked_prefill_request_id)] = True
        mask = torch.tensor(stays, dtype=torch.int32)
        told = at.update_requests(mask, torch.zeros(len(ids), dtype=torch.int64)) or {}
        if told.get("newly_paused_request_ids") is not None and at.paused_request_count:
            self.seen.add("paused")
        evicted = told.get("evict_request_ids")
        for request in [] if evicted is None else evicted.flatten().tolist():
            self.seen.add("evicted")
            self.waiting.append(self._request(request, 1 + max(self.said[request])))


def follows(changes: dict, seed: int, num_blocks: int = 60, wanted: frozenset[str] = frozenset()) -> None:
    """Of every token what the layer says of its request as a whole, to 1e-10."""
    attention = build_attention(make_config(**changes)).eval()
    x = torch.randn(64, LONGEST, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with on_the_cpu():
        at = context(attention.config, num_blocks)

        def forward() -> Tensor:
            count = int(at.active_token_count)
            owner, place = at.token_to_request_idx[:count], at.token_to_position_in_request[:count]
            rows = torch.full((int(at.padded_active_token_count), 1, HIDDEN), torch.nan, dtype=torch.float64)
            rows[:count, 0] = x[at.request_ids[owner.long()].long(), place.long()]
            out, bias = attention(rows, None, inference_context=at)
            assert bias is not None or not out[count:].any()
            return (out if bias is None else out + bias)[:count, 0].detach()

        engine = Engine(at, forward, seed)
        engine.run()
    assert wanted <= engine.seen, engine.seen
    assert len(engine.said) > 4
    for request, by_place in engine.said.items():
        length = max(by_place) + 1
        assert sorted(by_place) == list(range(length))
        out, bias = attention(x[request, :length, None], None)
        expected = (out if bias is None else out + bias)[:, 0].detach()
        found = torch.stack([by_place[place] for place in range(length)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    cache = at.nsa_layers[1].cache
    held = sum(-(-cache.length(seq) // cache.cfg.slc_block_len) for seq in at.nsa_layers[1]._seqs.values())
    assert cache.num_free_pages == pages_for(at, cache.cfg.slc_block_len) - held


def begun_anew_after_a_reset() -> None:
    """The same id with another text; what the first one had is freed."""
    attention = build_attention(make_config()).eval()
    x = torch.randn(2, 70, 1, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with on_the_cpu():
        at = context(attention.config, max_tokens=128)
        for text, length in ((0, 70), (1, 40)):
            at.reset()
            at.add_request(Engine(at, lambda: x, 0)._request(5, length))
            at.initialize_attention_state()
            rows = torch.zeros(at.padded_active_token_count, 1, HIDDEN, dtype=torch.float64)
            rows[:length] = x[text, :length]
            out, _ = attention(rows, None, inference_context=at)
            torch.testing.assert_close(out[:length], attention(x[text, :length], None)[0], rtol=0, atol=1e-10)
        layer = at.nsa_layers[1]
        assert [layer.cache.length(seq) for seq in layer._seqs.values()] == [40]


def a_whole_model() -> None:
    """Two requests of other lengths, the last tokens' logits alone."""
    model = build(SINGLE, position_embedding_type="rope").eval()
    ids = tokens()[:, :90]
    position = torch.arange(90).expand(2, -1)
    with torch.no_grad(), on_the_cpu():
        expected = model(ids, position, None)
        at, lengths = context(model.config, max_tokens=192), [70, 45]
        for request, length in enumerate(lengths):
            made = Engine(at, lambda: ids, 0)._request(request, length)
            made.prompt_tokens = made.remaining_prompt_tokens = ids[request, :length]
            at.add_request(made)
        for step in range(12):
            at.initialize_attention_state()
            given, places = at.current_input_and_position_ids()
            logits = model(given, places, None, inference_context=at, runtime_gather_output=True)
            if logits.shape[1] != 2:
                logits = at.last_token_logits(logits)[None]
            order = at.request_ids[:2].tolist()  # the context changes it
            wanted = torch.stack([expected[request, lengths[request] - 1 + step] for request in order])
            torch.testing.assert_close(logits[0], wanted, rtol=1e-4, atol=1e-5)
            following = torch.stack([ids[request, lengths[request] + step] for request in order])
            at.update_requests(torch.ones(2, dtype=torch.int32), following)


def refusals() -> None:
    attention = build_attention(make_config())
    with on_the_cpu():
        at = context(attention.config)
        at.add_request(Engine(at, lambda: None, 0)._request(0, 20))
        at.initialize_attention_state()
        x = torch.zeros(at.padded_active_token_count, 1, HIDDEN, dtype=torch.float64)

        def call(rows: Tensor = x, mask: Tensor | None = None) -> None:
            attention(rows, mask, inference_context=at)

        expect_error(call, "call model.eval")
        attention.eval()
        expect_error(lambda: call(x[:10]), "current_input_and_position_ids")
        expect_error(lambda: call(mask=torch.zeros(1, 1, 20, 20, dtype=torch.bool)), "no mask")
        for name, remedy in (
            ("enable_prefix_caching", "set it to False"),
            ("num_speculative_tokens", "set it to 0"),
            ("is_hybrid_model", "leave mamba_inference_state_config out"),
            ("cache_mla_latent", "set it to False"),
        ):
            with mock.patch.object(at, name, 2, create=True):
                expect_error(call, remedy)
        with mock.patch.object(at, "using_cuda_graph_this_step", return_value=True):
            expect_error(call, "num_cuda_graphs=None")
        at.request_kv_length_offsets[0] = 7
        expect_error(call, "the cache has 0 of it.*call the layer for every step")


def what_a_context_has() -> None:
    """Every attribute that the layer reads is one of the real class, made as it makes itself."""
    attention = build_attention(make_config())
    with on_the_cpu():
        at = context(attention.config)
    read = (
        "paused_request_count", "total_request_count", "active_token_count", "request_ids", "request_query_lengths",
        "request_kv_length_offsets", "chunked_prefill_request_id", "block_size_tokens", "is_hybrid_model",
    )  # fmt: skip
    assert not [name for name in read if not hasattr(at, name)]
    assert not at.is_static_batching()
    assert at.using_cuda_graph_this_step() is False
    assert pages_for(SimpleNamespace(block_allocator=SimpleNamespace(total_count=5), block_size_tokens=100), 64) == 10


DYNAMIC: dict[str, Callable[[], None]] = {
    "what a context has": what_a_context_has,
    **{name: partial(follows, changes, 3) for name, changes in VARIANTS.items()},
    "chunks, and steps that read and decode": partial(follows, {}, 5, 60, frozenset({"chunk", "mixed", "decode"})),
    "few blocks: some are evicted, and read again": partial(follows, {}, 8, 14, frozenset({"evicted"})),
    "begun anew after a reset": begun_anew_after_a_reset,
    "a whole model": a_whole_model,
    "refusals": refusals,
}
