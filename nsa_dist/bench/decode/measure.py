"""A case, checked against the reference first, then timed: on a GPU as a CUDA graph, beside dense attention."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_dist.bench.decode.case import DecodeCase
from nsa_dist.bench.decode.layer import Layer

Row = dict[str, Any]
MOST_ERROR = 1e-2  # of the norm: one rounding to bf16 of operands and results, as in the kernels' benchmark
CHECKED = 4  # sequences
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


class Clock:
    """Medians of runs, each behind a pass over more memory than any cache has."""

    def __init__(self, runs: int = 20) -> None:
        self.runs = runs
        self._flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")

    def seconds(self, function: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        """On the device. `before` runs untimed before each."""
        times = []
        for _ in range(self.runs + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if before:
                before()
            self._flush.zero_()
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return median(times[2:])

    def copy_bytes_per_s(self) -> float:
        """Read and written by a copy of 4 GiB."""
        source = torch.zeros(2**30, dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))


def measure(case: DecodeCase, device: torch.device, clock: Clock | None) -> Row:
    """`wrong` instead of times where the result is."""
    layer = Layer.of(case, device)
    checked = check(layer)
    if checked["wrong"]:
        return checked
    if clock is None:
        found = {"call_s": _call_seconds(layer, runs=3)}
    else:
        found = _graph_seconds(layer, clock) | {"call_s": _call_seconds(layer, runs=20)}
    if not case.fp8:
        return checked | found
    answer = layer.answer
    del layer
    assert answer is not None
    return checked | found | _against_wide(case, device, *answer)


def _against_wide(case: DecodeCase, device: torch.device, out: Tensor, blocks: Tensor) -> Row:
    """Of pages in 8 bits: how far the output is from that of the same numbers in pages of the dtype of q, over all
    heads, and over groups that have the same blocks; and how many of the chosen blocks are others. These are more of
    drawn keys, among which nothing stands out, than of keys that were learned."""
    wide_out, wide_blocks = Layer.of(replace(case, fp8=False), device).call()
    same = (blocks == wide_blocks).all(-1)  # [B, 1, Hkv]
    mine, wide = (x.double().unflatten(2, (same.shape[2], -1)) for x in (out, wide_out))
    others = [
        len(set(ours) - set(theirs))
        for ours, theirs in zip(blocks.flatten(0, -2).tolist(), wide_blocks.flatten(0, -2).tolist(), strict=True)
    ]
    return {
        "fp8_error": ((mine - wide).norm() / wide.norm()).item(),
        "fp8_error_same_blocks": ((mine - wide)[same].norm() / wide[same].norm()).item() if same.any() else None,
        "fp8_other_blocks": sum(others),
        "fp8_blocks": int((wide_blocks >= 0).sum()),
    }


def check(layer: Layer) -> Row:
    """Of some sequences: the error of the output in the norm, and how many rows of blocks are others."""
    layer.answer = out, blocks = layer.call()
    slots = layer.tables()
    some = sorted({round(i * (layer.case.batch - 1) / (CHECKED - 1)) for i in range(CHECKED)})
    expected, expected_blocks = layer.expected(slots, some)
    error = ((out[some].double() - expected.double()).norm() / expected.double().norm()).item()
    other = int((blocks[some] != expected_blocks).any(-1).sum())
    rows = expected_blocks[..., 0].numel()
    wrong = not error <= MOST_ERROR or other > max(1, rows // 50)
    note = f"out differs by {error:.1e} of its norm from the reference, {other} of {rows} rows chose other blocks"
    return {"error": error, "other_blocks": other, "checked_rows": rows, "wrong": note if wrong else None}


def _graph_seconds(layer: Layer, clock: Clock) -> Row:
    """Of replays of both graphs that `captured` has, without phi and with it, in which a block of each sequence becomes
    whole; of the latter also where none does; of empty launches in as many nodes, and how many those are; and of as
    many launches with as many reads that wait for each other (`chain`)."""
    from nsa_kernels.decode.chain import chain  # needs triton, as only a GPU does

    slots, lengths, cfg = layer.tables(), layer.cache.tables.lengths, layer.case.cfg
    at = lengths.clone()
    whole = at // cfg.cmp_stride * cfg.cmp_stride - 1
    launches = _launches(lambda: layer.step(slots, False))
    lengths.copy_(at)
    graph = captured(lambda: layer.step(slots, False))
    with_phi = captured(lambda: layer.step(slots))
    tiny = torch.zeros(1, device=lengths.device)
    floor = captured(lambda: [tiny.add_(1) for _ in range(launches)])
    found = {
        "launches": launches,
        "graph_s": clock.seconds(graph.replay, before=lambda: lengths.copy_(at)),
        "phi_s": clock.seconds(with_phi.replay, before=lambda: lengths.copy_(at)),
        "whole_s": clock.seconds(with_phi.replay, before=lambda: lengths.copy_(whole)),
        "floor_s": clock.seconds(floor.replay),
        "chain_s": clock.seconds(captured(chain(lengths)).replay),
    }
    lengths.copy_(at)
    return found


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `step`, which has run once before on another stream, as capturing wants."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # beside NCCL's watchdog
        step()
    return graph


def _launches(step: Callable[[], object]) -> int:
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device)


def _call_seconds(layer: Layer, runs: int) -> float:
    """Of `nsa_decode` as it is called, by the host's clock."""
    times = []
    for _ in range(runs):
        if layer.q.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        layer.call()
        if layer.q.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times)


def dense_seconds(case: DecodeCase, clock: Clock) -> dict[str, float | str]:
    """Of PyTorch's kept kernels for one query a sequence to all keys, by backend; or why there is no time."""
    num_q_heads, num_heads, dim_k, dim_v = case.heads

    def drawn(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.empty(case.batch, heads, tokens, dim, device="cuda", dtype=case.torch_dtype).normal_()

    q, k, v = (
        drawn(num_q_heads, 1, dim_k),
        drawn(num_heads, case.tokens + 1, dim_k),
        drawn(num_heads, case.tokens + 1, dim_v),
    )
    found: dict[str, float | str] = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                found[name] = clock.seconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:80]
    return found
