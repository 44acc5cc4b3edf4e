"""Decoding with a model as the replay of a CUDA graph: one for each number of sequences and of new tokens."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.attention import default_ops
from nsa_dist.cp.comm import Comm
from nsa_dist.inference import over_ranks
from nsa_dist.inference.decode import EMPTY_SLOT, decoding, has_kernels, paged, slots_of
from nsa_dist.inference.model import GPT, ModelCache


def can_capture(model: GPT, cache: ModelCache, cp_group: dist.ProcessGroup | Comm | None = None) -> bool:
    """Whether a step is launches alone: on a GPU, with kernels that take the layers' sizes, over ranks by NCCL."""
    weight = model.embedding.weight
    comm = cp_group if isinstance(cp_group, Comm) else Comm(cp_group)
    takes = over_ranks.has_kernels if comm.size > 1 else has_kernels
    return weight.is_cuda and comm.is_on_device and all(takes(default_ops(weight), layer) for layer in cache.layers)


class CapturedDecode:
    """`model.decode` for `batch` sequences, some of which may be empty slots, and `new` tokens of each.

    Captured at the first call, and again when what the graph reads has moved: when the cache has made room for more
    sequences, or the longest sequence has twice the pages. The host waits for nothing.

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
        self._addresses: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def __call__(self, tokens: Tensor, seqs: Sequence[int]) -> Tensor:
        """tokens [B, new] on the device and B ids -> logits [B, new, vocab], which the next call overwrites."""
        with ExitStack() as stack:
            for layer, slots in zip(self.cache.layers, self._slots, strict=True):
                stack.enter_context(decoding(layer, seqs, self.new))
                slots.copy_(slots_of(layer, seqs))
            self._tokens.copy_(tokens)
            addresses = [x.data_ptr() for layer in self.cache.layers for x in paged(layer)]
            if addresses != self._addresses:
                self._capture()
                self._addresses = addresses
            assert self._graph is not None
            assert self._logits is not None
            self._graph.replay()
        return self._logits

    def _capture(self) -> None:
        """The step runs once before, as capturing wants, on empty slots, which change nothing."""
        kept = [slots.clone() for slots in self._slots]
        for slots in self._slots:
            slots.fill_(EMPTY_SLOT)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.model.decode_step(self._tokens, self.cache, self._slots, self.cp_group)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events in another thread: such calls must not spoil the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = self.model.decode_step(self._tokens, self.cache, self._slots, self.cp_group)
        for slots, before in zip(self._slots, kept, strict=True):
            slots.copy_(before)
