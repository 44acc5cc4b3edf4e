"""A run's numbers on Ray's Prometheus endpoint, where `ray_` stands before each name.

Rank 0 gives what it writes to `metrics.jsonl`, each rank its own memory. The trainer knows nothing of it: it asks its
hooks. `launchers/grafana/nsa-dist.json` draws them.
"""

import threading
from typing import Any

import torch
from ray.util.metrics import Gauge

from nsa_dist.train.files.records import Record

# Of rank 0: the name, the record's kind and key, and what it is.
SCALARS = (
    ("nsa_step", "train", "step", "optimizer steps done"),
    ("nsa_loss", "train", "loss", "training loss of the last step, nats per token"),
    ("nsa_grad_norm", "train", "grad_norm", "norm of all gradients before clipping"),
    ("nsa_learning_rate", "train", "lr", "learning rate of the last step"),
    ("nsa_tokens_per_second", "train", "tokens_per_s", "tokens trained on in a second, over all ranks"),
    ("nsa_tokens", "train", "tokens", "tokens trained on so far"),
    ("nsa_validation_loss", "validation", "loss", "loss of the last evaluation, nats per token"),
    ("nsa_union_fraction", "traffic", "union_fraction", "of the remote blocks, those that some query chose"),
    ("nsa_load_imbalance", "traffic", "load_imbalance", "largest share of attention's work on a rank, over the mean"),
)
SENT_BYTES = "nsa_sent_bytes"  # of the last step, by kind
MEMORY = (
    ("nsa_host_memory_bytes", "memory of the rank's process on its host, resident"),
    ("nsa_gpu_memory_bytes", "memory of the rank's GPU that PyTorch holds for it"),
)
NAMES = frozenset([*(scalar[0] for scalar in SCALARS), SENT_BYTES, *(name for name, _ in MEMORY)])
_MEMORY_INTERVAL_S = 10.0


class RunMetrics:
    """Gauges of one run, filled from its records on rank 0."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._scalars = [(kind, key, Gauge(name, what, ("run",))) for name, kind, key, what in SCALARS]
        self._sent = Gauge(SENT_BYTES, "bytes that ranks sent for attention in the last step", ("run", "kind"))

    def feed(self, record: Record) -> None:
        """Take a record of `metrics.jsonl`; what it lacks keeps its last value."""
        for kind, key, gauge in self._scalars:
            if record["kind"] == kind and isinstance(record.get(key), int | float):
                gauge.set(record[key], self._tags)
        if record["kind"] == "traffic":
            for kind, sent in record["sent_bytes"].items():
                self._sent.set(sent, {**self._tags, "kind": kind})


class MemoryMetrics:
    """Gauges of one rank's memory, which a thread of its own reads: no rank but 0 is asked anything each step."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._host, self._gpu = (Gauge(name, what, ("run", "rank")) for name, what in MEMORY)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, name="memory-metrics", daemon=True)

    def __enter__(self) -> "MemoryMetrics":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def read(self) -> dict[str, int]:
        """Bytes by the metric's name."""
        import psutil

        (host, _), (gpu, _) = MEMORY
        sizes = {host: psutil.Process().memory_info().rss}
        if torch.cuda.is_initialized():
            sizes[gpu] = torch.cuda.memory_reserved()
        return sizes

    def _report(self) -> None:
        gauges: dict[str, Any] = {name: gauge for (name, _), gauge in zip(MEMORY, (self._host, self._gpu), strict=True)}
        while not self._ended.wait(_MEMORY_INTERVAL_S):
            for name, size in self.read().items():
                gauges[name].set(size, self._tags)
