"""Both sides checked against whole sequences, then timed in turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nsa_dist.bench.decode.measure import BACKENDS
from nsa_dist.bench.generate.sides import DenseSide, NSASide
from nsa_dist.inference.model import GPT

Row = dict[str, Any]
CHECKED = 4  # tokens behind the prompt
MOST_ERROR = {torch.bfloat16: 5e-2, torch.float32: 1e-4}  # of the norm of the logits


@dataclass
class Bench:
    """`batch` prompts of `tokens` tokens, `new` tokens behind each, `rounds` times."""

    model: GPT
    tokens: int
    batch: int
    new: int
    rounds: int = 3
    seed: int = 0
    prompts: Tensor = field(init=False)  # [batch, tokens + CHECKED]
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = self.batch, self.tokens + CHECKED
        prompts = torch.randint(1, self.model.config.vocab_size, sizes, generator=generator)
        self.prompts = prompts.to(self.model.embedding.weight.device)
        room = self.tokens + CHECKED + len(BACKENDS) * (self.rounds + 1) * self.new
        self.nsa, self.dense = NSASide(self.model, self.batch, room), DenseSide(self.model, self.batch, room)

    def row(self) -> Row:
        """`wrong` instead of times where a result is."""
        found = self.check()
        return found if found["wrong"] else found | self.times()

    def check(self) -> Row:
        """Logits of the last token of the prompt and of some behind it, by the cache, against those of the sequence as
        a whole. The caches then hold all prompts."""
        errors = {"nsa": self._nsa_error(), "dense": self._dense_error()}
        allowed = MOST_ERROR[self.model.config.torch_dtype]
        wrong = [f"{name} logits differ by {error:.1e} of their norm" for name, error in errors.items()]
        return {
            "errors": errors,
            "wrong": ", ".join(wrong) if not max(errors.values()) <= allowed else None,
            "parameters": sum(x.numel() for x in self.model.parameters()),
            "cache_bytes": self.nsa.cache.num_bytes() * self.batch // (self.batch + 1),
            "dense_cache_bytes": self.dense.twin.cache_bytes,
        }

    def _nsa_error(self) -> float:
        rows = torch.arange(self.tokens - 1, self.tokens + CHECKED, device=self.prompts.device)
        with torch.no_grad():
            expected = self.model(self.prompts[0], rows=rows)
        found = [self.nsa.prefill(p[: self.tokens], seq) for p, seq in zip(self.prompts, self.nsa.seqs, strict=True)]
        steps = [self.nsa.step(self.prompts[:, [self.tokens + i]])[0, -1].clone() for i in range(CHECKED)]
        return _error(torch.stack([found[0], *steps]), expected)

    def _dense_error(self) -> float:
        rows = list(range(self.tokens - 1, self.tokens + CHECKED))
        expected = self.dense.prefill(self.prompts[0], rows=rows)
        found = [self.dense.prefill(prompt[: self.tokens], slot) for slot, prompt in enumerate(self.prompts)]
        steps = []
        for i in range(CHECKED):
            self.dense.capture(self.tokens + i, None)
            steps.append(self.dense.step(self.prompts[:, [self.tokens + i]])[0].clone())
        return _error(torch.cat([found[0], *steps]), expected)

    def times(self) -> Row:
        """Medians of the rounds; in each every way once, in turn. A kernel that refuses is left out."""
        found = self._writing()
        if self.batch == 1:
            found |= _medians(self._reading(), self.rounds, self.prompts.device) | self._layer()
        return self._with_rates(found) | {"dense_refused": self.refused}

    def _reading(self) -> dict[str, Callable[[], object]]:
        prompt = self.prompts[0, : self.tokens]
        ways: dict[str, Callable[[], object]] = {
            "prefill_s": lambda: self.nsa.prefill(prompt),
            "prefill_whole_s": lambda: self.nsa.prefill(prompt, chunk=len(prompt)),
        }
        for backend in self._backends:
            way = partial(self.dense.prefill, prompt, backend=backend)
            if self._goes(f"prefill by {backend}", way):
                ways[f"dense_prefill_s {backend}"] = way
        return ways

    def _writing(self) -> Row:
        times: dict[str, list[float]] = {}
        for backend in self._backends:
            ways: dict[str, Callable[[], object]] = {"step_s": partial(self._write, self.nsa.step)}
            if self._goes(f"step by {backend}", partial(self.dense.capture, self.tokens, backend)):
                ways[f"dense_step_s {backend}"] = partial(self._write, self.dense.step)
            for name, seconds in _all_times(ways, self.rounds // 2 + 1, self.prompts.device).items():
                times.setdefault(name, []).extend(seconds)
        return {name: median(seconds) / self.new for name, seconds in times.items()}

    def _goes(self, name: str, way: Callable[[], object]) -> bool:
        """Whether it runs, once; if a kernel refuses, why it did is kept."""
        try:
            way()
        except RuntimeError as error:
            self.refused[name] = str(error).splitlines()[0][:120]
        return name not in self.refused

    @property
    def _backends(self) -> list[str | None]:
        return [*BACKENDS] if self.prompts.is_cuda else [None]

    def _write(self, step: Callable[[Tensor], Tensor]) -> None:
        """`new` tokens, each the likeliest behind those before it."""
        tokens = self.prompts[:, :1]
        for _ in range(self.new):
            tokens = step(tokens)[:, -1].argmax(-1, keepdim=True)

    def _layer(self) -> Row:
        """One layer: training's forward, and prefill of the whole prompt."""
        block = self.model.layers[0]
        layer, x = block.attention, block.attention_norm(self.model.embedding(self.prompts[0, : self.tokens]))
        cache = layer.make_cache(-(-self.tokens // layer.cfg.slc_block_len), 1, self.tokens)

        def prefill() -> None:
            seq = cache.new_sequence()
            layer.prefill(x, cache, [seq])
            cache.free(seq)

        def forward() -> None:
            with torch.no_grad():
                layer(x)

        return _medians({"layer_forward_s": forward, "layer_prefill_s": prefill}, self.rounds, x.device)

    def _with_rates(self, found: Row) -> Row:
        for name in ("dense_prefill_s", "dense_step_s"):
            ways = {key: value for key, value in found.items() if key.startswith(name)}
            if ways:
                found[name] = min(ways.values())
        rates = {"tokens_per_s": "step_s", "dense_tokens_per_s": "dense_step_s"}
        return found | {rate: self.batch / found[name] for rate, name in rates.items()}


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _medians(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    return {name: median(seconds) for name, seconds in _all_times(ways, rounds, device).items()}


def _all_times(
    ways: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds by the host's clock until the device is done, by way; one round before is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            _wait(device)
            begin = time.perf_counter()
            way()
            _wait(device)
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
