"""Decoding with a model as the replay of a CUDA graph: two for each number of sequences and of new tokens, with phi
and without it."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.inference import over_ranks
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.decode import EMPTY_SLOT, any_whole, decoding, has_kernels, rings_of, slots_of
from nsa_dist.inference.model import GPT, ModelCache
from nsa_dist.operators import default_ops


def can_capture(model: GPT, cache: ModelCache, cp_group: dist.ProcessGroup | Comm | None = None) -> bool:
    """Whether a step is launches alone: on a GPU, with kernels that take the layers' sizes, over ranks by NCCL."""
    weight = model.embedding.weight
    comm = cp_group if isinstance(cp_group, Comm) else Comm(cp_group)
    ops = default_ops(weight)

    def takes(layer: NSACache) -> bool:
        return over_ranks.has_kernels(ops, layer, comm.size) if comm.size > 1 else has_kernels(ops, layer)

    return weight.is_cuda and comm.is_on_device and all(map(takes, cache.layers))


class CapturedDecode:
    """`model.decode` for `batch` sequences, some of which may be empty slots, and `new` tokens of each.

    Captured when first needed, and again when what the graph reads has moved: when the cache has made room for more
    sequences, or the longest sequence has twice the pages. The host knows whether a compressed block becomes whole; the
    graph of steps in which none does has fewer launches. It waits for nothing.

    cp_group    of a cache over ranks, that holds its prompts; every rank calls alike
    """

    def __init__(
        self,
        model: GPT,
        cache: ModelCache,
        batch: int,
        new: int = 1,
        cp_group: dist.ProcessGroup | Comm | None = None,
    ) -> None:
        self.model, self.cache, self.batch, self.new, self.cp_group = model, cache, batch, new, cp_group
        device = model.embedding.weight.device
        self._tokens = torch.zeros(batch, new, dtype=torch.int64, device=device)
        self._slots = [torch.full((batch,), EMPTY_SLOT, dtype=torch.int32, device=device) for _ in cache.layers]
        self._rings = [[EMPTY_SLOT] * batch for _ in cache.layers]  # that the slots have
        self._held: list[object] = []  # that the graphs read
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens: Tensor, seqs: Sequence[int]) -> Tensor:
        """tokens [B, new] on the device and B ids -> logits [B, new, vocab], which the next call overwrites."""
        with_phi = any_whole(self.cache.layers[0], seqs, self.new)
        with ExitStack() as stack:
            for layer in self.cache.layers:
                stack.enter_context(decoding(layer, seqs, self.new))
            self._place(seqs)
            self._tokens.copy_(tokens)
            held = [x for layer in self.cache.layers for x in _movable(layer)]
            if len(held) != len(self._held) or any(a is not b for a, b in zip(held, self._held, strict=True)):
                self._graphs, self._held = {}, held
            if with_phi not in self._graphs:
                self._graphs[with_phi] = self._captured(with_phi)
            graph, logits = self._graphs[with_phi]
            graph.replay()
        return logits

    def _place(self, seqs: Sequence[int]) -> None:
        """Slots on the device, where sequences have others than before: mostly they stay from step to step."""
        for i, layer in enumerate(self.cache.layers):
            rings = rings_of(layer, seqs)
            if rings != self._rings[i]:
                self._slots[i].copy_(slots_of(layer, seqs))
                self._rings[i] = rings

    def _captured(self, with_phi: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step runs once before, as capturing wants, on empty slots, which change nothing."""
        kept = [slots.clone() for slots in self._slots]
        for slots in self._slots:
            slots.fill_(EMPTY_SLOT)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.model.decode_step(self._tokens, self.cache, self._slots, self.cp_group, with_phi=with_phi)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog asks for events in another thread: such calls must not spoil the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self.model.decode_step(
                    self._tokens, self.cache, self._slots, self.cp_group, with_phi=with_phi
                )  # fmt: skip
        finally:
            for slots, before in zip(self._slots, kept, strict=True):
                slots.copy_(before)
        return graph, logits


def _movable(cache: NSACache) -> tuple[object, ...]:
    """What is another object whenever tensors of the cache have moved."""
    return cache.storage, cache.storage.win, cache.storage.raw, cache.tables.page_table, cache.tables.lengths
