"""The cases one after the other, as time and memory allow; figures in generate.json, a table in generate.txt."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_dist.bench.generate.measure import Bench, Row
from nsa_dist.bench.show.report import Report, machine
from nsa_dist.config import NSAConfig
from nsa_dist.inference.folder import load_model
from nsa_dist.inference.model import GPT, GPTConfig

BILLION = (12, 2048, 64, 4, 128, 5632)  # layers, hidden, Hq, Hkv, head dim, FFN: 0.95 billion weights
TINY = (2, 64, 4, 1, 16, 128)
HEADER = f"{'':>16}{'prefill':>10}{'whole':>10}{'tokens/s':>10}{'dense:':>8}{'prefill':>10}{'tokens/s':>10}{'times':>7}"


@dataclass(frozen=True)
class GenerateRequest:
    """None: what the device is good for. `model`: an exported folder; None: drawn weights of `sizes`."""

    out: Path
    model: Path | None = None
    sizes: Sequence[int] | None = None
    device: str | None = None
    tokens: Sequence[int] | None = None
    batches: Sequence[int] | None = None
    new: int = 64
    budget_s: float = 540.0

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda was given, but torch sees no GPU here, and its kernels cannot be timed without one; "
                "leave it out, or give --device cpu"
            )
        if min([1, self.new, *(self.tokens or ()), *(self.batches or ())]) < 1:
            raise ValueError(
                f"--tokens {self.tokens}, --batch {self.batches} and --new {self.new} must be numbers from 1 on, as "
                f"they are counts; give for example --tokens 65536 --batch 1,8 --new 64"
            )
        if self.sizes is not None and (self.model is not None or len(self.sizes) != 6 or min(self.sizes) < 1):
            raise ValueError(
                f"--sizes {self.sizes} must be six numbers, layers, hidden size, Hq, Hkv, head dim and FFN size, and "
                f"there is no --model then, which has sizes of its own; give for example --sizes "
                f"{','.join(map(str, BILLION))}"
            )


def run(request: GenerateRequest) -> bool:
    """Whether a result was wrong."""
    begin = time.monotonic()
    device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    model = _model(request, device)
    report = Report(request.out, machine(device.type, 1, "a model, greedy, from a prompt on"), "generate")
    count = sum(x.numel() for x in model.parameters())
    report.data["model"] = model.config.as_json()
    report.say(
        f"{count / 1e9:.3f} billion weights, {model.config.num_layers} layers, {model.config.dtype}; prefill in s, in "
        f"chunks as generate reads and as a whole; times: tokens/s against dense"
    )
    report.say(HEADER)
    for tokens in request.tokens or ((65536,) if on_gpu else (600,)):
        for batch in request.batches or ((1, 8) if on_gpu else (1, 2)):
            name = f"batch {batch}, {tokens}"
            if time.monotonic() - begin > request.budget_s:
                report.leave_out(name, f"the time, {request.budget_s:g} s, is over")
                continue
            try:
                row = {"case": name, "tokens": tokens, "batch": batch, "new": request.new}
                row |= Bench(model, tokens, batch, request.new).row()
            except torch.cuda.OutOfMemoryError:
                report.leave_out(name, "out of memory")
                continue
            report.add("cases", row, _line(row))
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    return any(row["wrong"] for row in report.data.get("cases", []))


def _model(request: GenerateRequest, device: torch.device) -> GPT:
    if request.model is not None:
        return load_model(request.model, device)
    on_gpu = device.type == "cuda"
    layers, hidden, num_q_heads, num_kv_heads, head_dim, ffn = request.sizes or (BILLION if on_gpu else TINY)
    torch.manual_seed(0)
    config = GPTConfig(
        layers, hidden, num_q_heads, num_kv_heads, head_dim, ffn, NSAConfig(), dtype="bf16" if on_gpu else "fp32"
    )
    return GPT(config, device).requires_grad_(False).eval()


def _line(row: Row) -> str:
    name = f"{row['case']:>16}"
    if row["wrong"]:
        return f"{name}  WRONG: {row['wrong']}"
    prefill = (f"{row[key]:>10.3f}" if key in row else f"{'':>10}" for key in ("prefill_s", "prefill_whole_s"))
    dense = f"{row['dense_prefill_s']:>10.3f}" if "dense_prefill_s" in row else f"{'':>10}"
    rate, dense_rate = row["tokens_per_s"], row["dense_tokens_per_s"]
    layer = ""
    if "layer_forward_s" in row:
        layer = (
            f"  a layer {1e3 * row['layer_prefill_s']:.1f} ms, training's forward {1e3 * row['layer_forward_s']:.1f}"
        )
    return f"{name}{''.join(prefill)}{rate:>10.1f}{'':>8}{dense}{dense_rate:>10.1f}{rate / dense_rate:>6.1f}x{layer}"
