"""The smallest run that has everything in it, and the command that starts it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from nsa_dist.train.files.records import MetricsFollower
from nsa_dist.train.hooks import Hooks
from nsa_dist.train.loop import train
from nsa_launch.config import RunConfig, load
from nsa_launch.processes import decide
from nsa_launch.run_folder import RunFolder

TINY = {
    "run": {"steps": 24, "sequence_length": 256, "checkpoint_interval": 5, "eval_interval": 100, "eval_batches": 1},
    "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "ffn_hidden_size": 64},
    "nsa": {"num_slc_blocks": 3, "window_len": 64},
    "parallel": {"context_parallel_size": 2},
    "optimizer": {"warmup_steps": 2},
    "launch": {"device": "cpu", "cpus_per_process": 0.5},
}


def tiny_file(folder: Path, corpus: Path | None = None) -> Path:
    """A YAML file of the tiny run below `folder`, its output in `folder/run`."""
    raw = {**TINY, "run": {**TINY["run"], "output_dir": str(folder / "run")}}
    if corpus is not None:
        raw["data"] = {"folder": str(corpus), "pattern": "*.txt", "validation_fraction": 0.5}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def trained(rank: int, path: Path, words: Sequence[str]) -> None:
    """The run of a file without a launcher, by processes that share a group, as many threads each as a launcher's."""
    config = load(path, words)
    torch.set_num_threads(decide(config, 0).threads_each)
    train(config, Hooks(), torch.device("cpu"))


def tiny(folder: Path, *overrides: str) -> RunConfig:
    return load(tiny_file(folder), overrides)


class Command:
    """`nsa-dist train` on a tiny file in a process group of its own, and a watch over its run's folder."""

    patience_s = 600  # a machine may be busy; no test waits for a time to pass

    def __init__(self, config: Path, home: Path) -> None:
        self._config = config
        self._output = home / "said"
        # Ray leaves a token in HOME. RAY_ADDRESS would make the run join a cluster. A process that crashes says where.
        self._environment = {**os.environ, "HOME": str(home), "PYTHONFAULTHANDLER": "1"}
        self._environment.pop("RAY_ADDRESS", None)
        self._folder = RunFolder(load(config).run.output_dir)
        self._process: subprocess.Popen | None = None

    @contextmanager
    def started(self, *words: str) -> Iterator[subprocess.Popen]:
        """The running command; its whole group is gone when the context ends, whatever happens."""
        with self._running([sys.executable, "-m", "nsa_launch", "train", str(self._config), *words]) as process:
            yield process

    @contextmanager
    def torchrun_started(self, max_restarts: int, *words: str) -> Iterator[subprocess.Popen]:
        """The same through torchrun."""
        launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(max_restarts)]
        module = ["-m", "nsa_launch.torchrun", str(self._config), *words]
        with self._running([sys.executable, "-m", "torch.distributed.run", *launcher, *module]) as process:
            yield process

    @contextmanager
    def _running(self, command: list[str]) -> Iterator[subprocess.Popen]:
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                yield self._process
            finally:
                if self._process.poll() is None:
                    os.killpg(self._process.pid, signal.SIGKILL)
                    self._process.wait()

    def torchrun(self, *words: str) -> str:
        """The same run through torchrun, to its end; what it printed."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "nsa_launch.torchrun", str(self._config), *words]
        done = subprocess.run(command, env=self._environment, timeout=self.patience_s, capture_output=True, text=True)
        assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def said(self) -> str:
        """Everything the command has printed."""
        return self._output.read_text()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Look again and again; the command must not end before."""
        assert self._process is not None
        deadline = time.monotonic() + self.patience_s
        while not happened():
            assert self._process.poll() is None, f"exit code {self._process.returncode} too early:\n{self.said()}"
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)  # between two looks

    def events(self, kind: str) -> list[dict]:
        """Of `launches.jsonl`."""
        return [event for event in MetricsFollower(self._folder.launches).poll() if event["event"] == kind]

    def train_records(self) -> list[dict]:
        """Of `metrics.jsonl`, repeated steps included."""
        return [record for record in MetricsFollower(self._folder.output.metrics).poll() if record["kind"] == "train"]

    def last_step(self) -> int:
        return max((record["step"] for record in self.train_records()), default=0)
