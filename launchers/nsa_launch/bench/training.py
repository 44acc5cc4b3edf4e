"""A short training run over all ranks with tensor, context and data parallelism, against the same run on one rank."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import yaml

from nsa_dist.bench.show.report import Report, Row
from nsa_dist.bench.world import Place
from nsa_dist.train.files.records import read_metrics
from nsa_launch.bench.request import Request

_LEAST_S = 60.0


@dataclass(frozen=True)
class Split:
    """Parallel sizes whose product is the number of ranks."""

    tensor: int
    context: int
    data: int

    @classmethod
    def of(cls, num_ranks: int) -> "Split":
        """Context first, then tensor, then data: 2 = 1 x 2 x 1, 4 = 2 x 2 x 1, 8 = 2 x 2 x 2."""
        context = 2 if num_ranks % 2 == 0 else 1
        tensor = 2 if num_ranks // context % 2 == 0 else 1
        return cls(tensor, context, num_ranks // context // tensor)

    @property
    def name(self) -> str:
        return f"TP {self.tensor} x CP {self.context} x DP {self.data}"

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.context * self.data


def run(request: Request, place: Place, report: Report) -> None:
    """Both runs through torchrun, each a process a rank; what keeps them from running is said and kept."""
    split = Split.of(place.num_ranks)
    obstacle = _obstacle(place, request.left_s)
    if obstacle:
        report.leave_out(f"training with {split.name}", obstacle)
        return
    report.say(f"\nTraining a small model with {split.name} against one rank")
    found: list[Row] = []
    for each in (Split(1, 1, 1), split):
        row = _train(request, place, each, batch=split.data)
        report.add("training", row, _line(row))
        found.append(row)
    if all("error" not in row for row in found):
        pairs = list(zip(found[0]["losses"], found[1]["losses"], strict=True))
        off = max(abs(a - b) / abs(a) for a, b in pairs)
        report.add("training", {"largest_difference": off}, f"  losses differ by at most {off:.1e} of their value")


def _obstacle(place: Place, left_s: float) -> str:
    if find_spec("megatron") is None:
        return "megatron-core is not installed, and the model is its; pip install --editable '.[train]'"
    if place.device == "cuda" and place.shared:
        return "Megatron-core's gradient sums do not run over gloo on a shared GPU; it needs --gpus"
    return "" if left_s >= _LEAST_S else "the time is over"


def _train(request: Request, place: Place, split: Split, batch: int) -> Row:
    folder = request.out / f"train-{split.num_ranks}"
    config = request.out / f"train-{split.num_ranks}.yaml"
    config.write_text(yaml.safe_dump(_config(place.device, split, batch, folder)))
    row: Row = {"split": split.name, "ranks": split.num_ranks}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(split.num_ranks)]
    command += ["--standalone", "-m", "nsa_launch.torchrun", str(config)]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}
    log = request.out / f"train-{split.num_ranks}.log"
    with log.open("w") as file:
        # A session of their own, so that what torchrun started ends with it.
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(timeout=request.left_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {**row, "error": f"not done when the time was over; see {log}"}
    return {**row, "error": f"exit code {code}; see {log}"} if code else {**row, **_results(folder)}


def _results(folder: Path) -> Row:
    records = read_metrics(folder / "metrics.jsonl", "train")
    speeds = [record["tokens_per_s"] for record in records[2:]]  # the first steps compile
    return {"losses": [record["loss"] for record in records], "tokens_per_s": median(speeds)}


def _config(device: str, split: Split, batch: int, folder: Path) -> Row:
    """A small model that every split divides; fp32, so that losses can be compared closely."""
    large = device == "cuda"
    return {
        "run": {
            "output_dir": str(folder),
            "overwrite": True,
            "steps": 20 if large else 6,
            "sequence_length": 16384 if large else 1024,
            "global_batch_size": batch,
            "eval_interval": 1000,
            "checkpoint_interval": 1000,
        },
        "model": {
            "num_layers": 2,
            "hidden_size": 512 if large else 64,
            "num_attention_heads": 8 if large else 4,
            "num_query_groups": 2,
            "head_dim": 64 if large else 16,
            "ffn_hidden_size": 1536 if large else 128,
        },
        "nsa": {"num_slc_blocks": 8, "window_len": 128},
        "parallel": {
            "tensor_model_parallel_size": split.tensor,
            "context_parallel_size": split.context,
            "sequence_parallel": split.tensor > 1,
        },
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
        "launch": {"device": device, "processes_per_node": split.num_ranks},
    }


def _line(row: Row) -> str:
    if "error" in row:
        return f"  {row['split']:24} FAILED: {row['error']}"
    first, last = row["losses"][0], row["losses"][-1]
    return f"  {row['split']:24} {row['tokens_per_s']:,.0f} tokens/s, loss {first:.4f} -> {last:.4f}"
