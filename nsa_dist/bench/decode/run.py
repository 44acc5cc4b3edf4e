"""The cases one after the other, as time and memory allow; figures in decode.json, a table in decode.txt."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from nsa_dist.bench.decode.case import PAPER_HEADS, DecodeCase
from nsa_dist.bench.decode.measure import Clock, Row, dense_seconds, measure
from nsa_dist.bench.show.report import Report, machine
from nsa_dist.inference.pool import CmpPlacement

BATCHES = (1, 8, 64)
TOKENS = (4096, 16384, 65536, 262144, 1048576)
TINY_HEADS = (4, 2, 16, 16)
HEADER = (
    f"{'':>21}{'graph':>9}{'+ phi':>9}{'whole':>9}{'floor':>9}{'call':>9}{'NSA bytes':>11}{'of rate':>9}"
    f"{'dense bytes':>13}{'times':>7}  dense kernels"
)


@dataclass(frozen=True)
class DecodeRequest:
    """None: what the device is good for."""

    out: Path
    device: str | None = None
    batches: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    heads: tuple[int, int, int, int] | None = None
    only: str = ""
    budget_s: float = 540.0
    dense: bool = True
    fp8: bool = False
    placements: Sequence[CmpPlacement] = get_args(CmpPlacement)  # over ranks

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda was given, but torch sees no GPU here, and kernels for GPUs cannot be timed without "
                "one; leave it out, or give --device cpu"
            )
        if min([1, *(self.batches or ()), *(self.tokens or ())]) < 1 or (self.heads and len(self.heads) != 4):
            raise ValueError(
                f"--batch {self.batches}, --tokens {self.tokens} and --heads {self.heads} must be numbers "
                "from 1 on, as they are counts, and heads four, Hq,Hkv,Dk,Dv; give for example --batch 1,8 --tokens "
                "4096 --heads 64,4,128,128"
            )

    def cases(self, on_gpu: bool) -> list[DecodeCase]:
        batches = self.batches or (BATCHES if on_gpu else (1, 2))
        tokens = self.tokens or (TOKENS if on_gpu else (300, 1000))
        heads = self.heads or (PAPER_HEADS if on_gpu else TINY_HEADS)
        made = [DecodeCase(b, t, heads, "bf16" if on_gpu else "fp32", fp8=self.fp8) for t in tokens for b in batches]
        return [case for case in made if self.only in case.name]


def run(request: DecodeRequest) -> bool:
    """Whether a result was wrong."""
    begin = time.monotonic()
    device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = Report(request.out, machine(device.type, 1, "one layer, one new token a sequence"), "decode")
    clock = Clock() if device.type == "cuda" else None
    rate = clock.copy_bytes_per_s() if clock else None
    if rate:
        report.data["copy_bytes_per_s"] = rate
        report.say(f"copies {rate / 1e12:.2f} TB/s; times in us, medians; NSA and dense bytes: their time at that rate")
    else:
        report.say("no GPU: the operators of training, as nsa_decode calls them, checked; call in us")
    report.say(HEADER)
    for case in request.cases(device.type == "cuda"):
        _one(case, request, device, clock, rate, report, time.monotonic() - begin)
        gc.collect()
        if clock:
            torch.cuda.empty_cache()
    return any(row.get("wrong") for row in report.data.get("cases", []))


def _one(
    case: DecodeCase, request: DecodeRequest, device: torch.device, clock: Clock | None, rate: float | None,
    report: Report, spent_s: float,
) -> None:  # fmt: skip
    if spent_s > request.budget_s:
        report.leave_out(case.name, f"the time, {request.budget_s:g} s, is over")
        return
    if clock:
        total = torch.cuda.get_device_properties(device).total_memory
        if case.memory_bytes > 0.9 * total:
            report.leave_out(case.name, f"its cache takes {case.memory_bytes / 2**30:.0f} GiB of {total / 2**30:.0f}")
            return
    try:
        row = case.as_data() | measure(case, device, clock)
        if clock and rate and not row["wrong"]:
            row |= {"nsa_bytes_s": case.nsa_bytes / rate, "dense_bytes_s": case.dense_bytes / rate}
            gc.collect()
            torch.cuda.empty_cache()
            row["dense"] = dense_seconds(case, clock) if request.dense else {}
    except torch.cuda.OutOfMemoryError:
        report.leave_out(case.name, "out of memory")
        return
    report.add("cases", row, _line(row))


def _line(row: Row) -> str:
    name = f"{row['case']:>21}"
    if row["wrong"]:
        return f"{name}  WRONG: {row['wrong']}"
    if "graph_s" not in row:
        return f"{name}{'':>36}{_us(row['call_s'])}{_fp8(row)}"
    graph, own, dense = row["graph_s"], row["nsa_bytes_s"], row["dense_bytes_s"]
    kernels = ", ".join(
        f"{name} {1e6 * s:,.0f}" if isinstance(s, float) else f"{name}: {s}" for name, s in row["dense"].items()
    )
    return (
        f"{name}{_us(graph)}{_us(row['phi_s'])}{_us(row['whole_s'])}{_us(row['floor_s'])}{_us(row['call_s'])}"
        f"{_us(own, 11)}{own / graph:>9.0%}{_us(dense, 13)}{dense / graph:>6.1f}x  {kernels}{_fp8(row)}"
    )


def _fp8(row: Row) -> str:
    if "fp8_error" not in row:
        return ""
    others, blocks, same = row["fp8_other_blocks"], row["fp8_blocks"], row["fp8_error_same_blocks"]
    of_same = "" if same is None else f" ({same:.1%} where blocks are the same)"
    return f"  fp8: {row['fp8_error']:.1%} from wide pages{of_same}, {others:,} of {blocks:,} blocks others"


def _us(seconds: float, width: int = 9) -> str:
    return f"{1e6 * seconds:>{width},.1f}"
