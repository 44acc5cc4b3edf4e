"""Texts that a model goes on with, several at once, token by token as they come."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_dist.cp.device import put_on
from nsa_dist.inference.captured import CapturedDecode, can_capture
from nsa_dist.inference.decode import EMPTY_SLOT
from nsa_dist.inference.model import GPT, ModelCache

PREFILL_CHUNK = 16384  # tokens of a prompt at once: bounds memory


class Sampling(NamedTuple):
    """temperature 0: always the likeliest; top_p: from the fewest likeliest tokens that have this probability."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """ValueError for values that mean nothing."""
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} must be 0 or more and top_p={self.top_p} above 0, at most 1, as they "
                f"shape probabilities; take temperature=0 for the likeliest token each time"
            )


class Piece(NamedTuple):
    """One new token of a prompt."""

    prompt: int
    token: int


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[Piece]:
    """Up to `max_new_tokens` tokens behind each prompt; one ends early at the end of its document, which is not given.

    Prompts have random numbers of their own: what is drawn for one does not depend on the others. An empty prompt
    begins behind an end of document. ValueError for tokens beyond the vocabulary.
    """
    sampling = sampling or Sampling()
    sampling.check()
    end, device = model.config.end_of_document, model.embedding.weight.device
    prompts = [list(prompt) or [end] for prompt in prompts]
    _check_prompts(prompts, max_new_tokens, model.config.vocab_size)
    generators = [torch.Generator().manual_seed(sampling.seed + index) for index in range(len(prompts))]
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    cache = model.make_cache(longest, len(prompts))
    seqs = [cache.new_sequence() for _ in prompts]
    running = list(range(len(prompts)))
    logits = [_read(model, prompt, cache, seq, device) for prompt, seq in zip(prompts, seqs, strict=True)]
    step = _step(model, cache, seqs)
    for number in range(max_new_tokens):
        tokens = [draw(x, sampling, generators[index]) for x, index in zip(logits, running, strict=True)]
        going = [(index, token) for index, token in zip(running, tokens, strict=True) if token != end]
        yield from (Piece(*piece) for piece in going)
        running = [index for index, _ in going]
        if not running or number == max_new_tokens - 1:
            return
        logits = step(dict(going))


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token by logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits.double() / sampling.temperature, 0)
    ordered, tokens = chances.sort(descending=True, stable=True)
    kept = ordered.cumsum(0) - ordered < sampling.top_p  # those before it do not yet have top_p
    return int(tokens[torch.multinomial(ordered * kept, 1, generator=generator)])


def _step(model: GPT, cache: ModelCache, seqs: Sequence[int]) -> Callable[[dict[int, int]], list[Tensor]]:
    """A function of the next token of each prompt that goes on: their logits [vocab]. On a GPU a graph's replay."""
    device = model.embedding.weight.device
    if not can_capture(model, cache):

        def called(tokens: dict[int, int]) -> list[Tensor]:
            new = torch.tensor([[token] for token in tokens.values()], device=device)
            return list(model.decode(new, cache, [seqs[index] for index in tokens])[:, -1].cpu())

        return called
    captured = CapturedDecode(model, cache, len(seqs))

    def replayed(tokens: dict[int, int]) -> list[Tensor]:
        new = torch.tensor([[tokens.get(index, 0)] for index in range(len(seqs))])
        slots = [seq if index in tokens else EMPTY_SLOT for index, seq in enumerate(seqs)]
        logits = captured(put_on(device, new), slots)[:, -1].cpu()
        return [logits[index] for index in tokens]

    return replayed


def _read(model: GPT, prompt: Sequence[int], cache: ModelCache, seq: int, device: torch.device) -> Tensor:
    """Prefill in chunks; the logits [vocab] behind the last token."""
    for start in range(0, len(prompt), PREFILL_CHUNK):
        chunk = torch.tensor(prompt[start : start + PREFILL_CHUNK], device=device)
        logits = model.prefill(chunk, cache, [seq], rows=torch.tensor([len(chunk) - 1], device=device))[-1]
    return logits.cpu()


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int) -> None:
    beyond = sorted({token for prompt in prompts for token in prompt if not 0 <= token < vocab_size})
    if beyond:
        raise ValueError(
            f"prompts have the tokens {beyond[:5]}, but the vocabulary is 0 to {vocab_size - 1}; encode the text with "
            f"the model's tokenizer"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1, or nothing is generated; ask for some")
