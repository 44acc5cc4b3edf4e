"""A short training run over all ranks with tensor, context and data parallelism, against the same run on one rank.

Ranks of another tensor-parallel size draw other weights, so both go on from one checkpoint: one rank makes a first step
and saves it, each layout resumes from a copy of that folder. Losses of the same weights on the same samples are then
equal to rounding, and are judged.
"""

import os
import shutil
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
from nsa_dist.train.files.marker import RunMarker, found, remove
from nsa_dist.train.files.records import read_metrics
from nsa_launch.bench.request import Request

LEAST_S = 150.0  # kept for these runs, which come last: three, of which each took 35 s on two H200s
_BEGUN = 1  # steps of the run from which both go on
# Relative, of the loss, fp32. The first step has the same weights: what differs is the order of sums (1e-7 on 4 H100s).
# Later a near tie in the selection may fall otherwise, and Adam makes more of it (docs/decisions/tiny-job.md).
FIRST_STEP_ALLOWED, ALL_STEPS_ALLOWED = 1e-6, 1e-4


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
    """Through torchrun, each a process a rank; what keeps the runs from running is said and kept."""
    split = Split.of(place.num_ranks)
    obstacle = _obstacle(place, request.left_s)
    if obstacle:
        report.leave_out(f"training with {split.name}", obstacle)
        return
    report.say(f"\nTraining a small model with {split.name} against one rank, both from one checkpoint")
    start = request.out / "train-start"
    begun = _train(request, place, Split(1, 1, 1), split.data, start, steps=_BEGUN)
    if "error" in begun:
        report.add("training", begun, _line(begun))
        return
    rows: list[Row] = []
    for each in (Split(1, 1, 1), split):
        folder = request.out / f"train-{each.num_ranks}"
        _copy_run(start, folder)
        row = _train(request, place, each, split.data, folder)
        report.add("training", row, _line(row))
        rows.append(row)
    if all("error" not in row for row in rows):
        judged = judge(rows[0]["losses"], rows[1]["losses"])
        report.add("training", judged, _verdict(judged))


def judge(one: list[float], other: list[float]) -> Row:
    """How far the losses of two layouts are apart, relative; `wrong` says what is more than allowed."""
    apart = [abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)]
    first, largest = apart[0], max(apart, key=lambda off: (off != off, off))  # NaN is the largest of all
    bounds = [("the first step", first, FIRST_STEP_ALLOWED), ("a step", largest, ALL_STEPS_ALLOWED)]
    wrong = [
        f"{what} differs by {off:.1e} of the loss, allowed are {allowed:.0e}"
        for what, off, allowed in bounds
        if not off <= allowed
    ]
    return {"first_difference": first, "largest_difference": largest, "wrong": ", ".join(wrong)}


def _obstacle(place: Place, left_s: float) -> str:
    if find_spec("megatron") is None:
        return "megatron-core is not installed, and the model is its; pip install --editable '.[train]'"
    if place.device == "cuda" and place.shared:
        return "Megatron-core's gradient sums do not run over gloo on a shared GPU; it needs --gpus"
    return "" if left_s >= LEAST_S else "the time is over"


def _copy_run(start: Path, folder: Path) -> None:
    """`folder` becomes the run in `start`; of an earlier bench's run in it, what its marker names is removed."""
    old = RunMarker.read(folder)
    for path in found(folder, old.made) if old else ():
        remove(path)
    shutil.copytree(start, folder, dirs_exist_ok=True)


def _train(request: Request, place: Place, split: Split, batch: int, folder: Path, steps: int | None = None) -> Row:
    """A run of its own if `steps` is given, else the one in `folder` to its end."""
    config = folder.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(_config(place.device, split, batch, folder, steps)))
    row: Row = {"split": split.name, "ranks": split.num_ranks}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(split.num_ranks)]
    command += ["--standalone", "-m", "nsa_launch.torchrun", str(config)]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        # A session of their own, so that what torchrun started ends with it.
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(timeout=request.left_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {**row, "error": f"not done when the time was over; see {log}"}
    if code:
        return {**row, "error": f"exit code {code}; see {log}"}
    return {**row, **_results(folder)} if steps is None else row


def _results(folder: Path) -> Row:
    records = [r for r in read_metrics(folder / "metrics.jsonl", "train") if r["step"] > _BEGUN]
    speeds = [record["tokens_per_s"] for record in records[2:]]  # the first steps compile
    return {"losses": [record["loss"] for record in records], "tokens_per_s": median(speeds)}


def _config(device: str, split: Split, batch: int, folder: Path, steps: int | None) -> Row:
    """A small model that every split divides; fp32, so that losses can be compared closely.

    steps       of a run that begins; None for one that goes on to the end
    """
    large = device == "cuda"
    return {
        "run": {
            "output_dir": str(folder),
            "overwrite": steps is not None,
            "resume": steps is None,
            "steps": steps or _BEGUN + (20 if large else 6),
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
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 0},
        "launch": {"device": device, "processes_per_node": split.num_ranks},
    }


def _verdict(row: Row) -> str:
    first, most = row["first_difference"], row["largest_difference"]
    line = f"  losses differ by {first:.1e} of their value at the first step, by {most:.1e} at most"
    allowed = f"allowed are {FIRST_STEP_ALLOWED:.0e} and {ALL_STEPS_ALLOWED:.0e}"
    return f"{line} ({allowed})" + (f"  WRONG: {row['wrong']}" if row["wrong"] else "")


def _line(row: Row) -> str:
    if "error" in row:
        return f"  {row['split']:24} FAILED: {row['error']}"
    first, last = row["losses"][0], row["losses"][-1]
    return f"  {row['split']:24} {row['tokens_per_s']:,.0f} tokens/s, loss {first:.4f} -> {last:.4f}"
