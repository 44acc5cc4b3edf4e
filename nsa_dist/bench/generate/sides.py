"""The two models that are compared, each as what is timed: a prompt read, and tokens one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_dist.bench.decode.measure import captured
from nsa_dist.bench.generate.dense import DenseTwin, by
from nsa_dist.inference.captured import CapturedDecode, can_capture
from nsa_dist.inference.generate import PREFILL_CHUNK
from nsa_dist.inference.model import GPT


class NSASide:
    """The model as `generate` runs it: prompts in chunks, steps as a graph's replay where one can be captured."""

    def __init__(self, model: GPT, batch: int, num_tokens: int) -> None:
        self.model, self.batch = model, batch
        self.cache = model.make_cache(num_tokens, batch + 1)  # one more, for the prompt that is timed
        self.seqs = [self.cache.new_sequence() for _ in range(batch)]
        self._captured = CapturedDecode(model, self.cache, batch) if can_capture(model, self.cache) else None

    def prefill(self, tokens: Tensor, seq: int | None = None, chunk: int = PREFILL_CHUNK) -> Tensor:
        """logits [vocab] behind the prompt; without a sequence nothing of it stays."""
        held = self.cache.new_sequence() if seq is None else seq
        for part in tokens.split(chunk):
            last = torch.tensor([len(part) - 1], device=tokens.device)
            logits = self.model.prefill(part, self.cache, [held], rows=last)[-1]
        if seq is None:
            self.cache.free(held)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [batch, 1] -> logits [batch, 1, vocab]."""
        if self._captured is None:
            return self.model.decode(tokens, self.cache, self.seqs)
        return self._captured(tokens, self.seqs)


class DenseSide:
    """The dense twin; a step is a graph's replay at one length, again and again: that of the prompt."""

    def __init__(self, model: GPT, batch: int, num_tokens: int) -> None:
        self.twin = DenseTwin(model, batch, num_tokens)
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.embedding.weight.device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def prefill(self, tokens: Tensor, slot: int = 0, rows: Sequence[int] = (-1,), backend: str | None = None) -> Tensor:
        with by(backend):
            return self.twin.prefill(tokens, slot, rows)

    def capture(self, length: int, backend: str | None) -> None:
        """A step behind `length` tokens, by this kernel."""
        self._length, self._backend = length, backend
        if not self._tokens.is_cuda:
            return

        def step() -> None:
            with by(backend):
                self._logits = self.twin.step(self._tokens, length)

        self._graph = captured(step)

    def step(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        if self._graph is None:
            with by(self._backend):
                return self.twin.step(self._tokens, self._length)
        self._graph.replay()
        assert self._logits is not None
        return self._logits
