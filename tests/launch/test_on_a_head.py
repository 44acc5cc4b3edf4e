"""A Ray that the same user started: jobs of it, a run that joins it, its dashboard and its metrics.

The user has a token, as after any `ray.init`, so this Ray asks for it.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch_cases import tiny_file
from nsa_dist.train.files.records import MetricsFollower
from nsa_launch import exit_codes
from nsa_launch.on_ray.shown import prometheus
from nsa_launch.run_folder import RunFolder

pytestmark = pytest.mark.slow
PATIENCE_S = 600


@dataclass(frozen=True)
class Head:
    """`ray start --head --block` in a HOME of its own."""

    home: Path
    environment: dict[str, str]
    gcs: str
    dashboard: str
    metrics: str
    token: str

    def call(self, *words: str) -> subprocess.CompletedProcess:
        """One of our commands, in the user's environment, to its end."""
        command = [sys.executable, "-m", "nsa_launch", *words]
        return subprocess.run(
            command,
            env=self.environment,
            timeout=PATIENCE_S,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def get(self, url: str) -> str:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.2)  # between two looks


def free_ports(number: int) -> list[int]:
    """That nobody listens on now. Ray takes no sockets, only numbers."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    token = secrets.token_hex(32)
    (home / ".ray" / "auth_token").write_text(token)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    gcs, dashboard, metrics, client, agent = free_ports(5)
    words = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
    words += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    words += ["--num-cpus=2", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats"]
    words += ["--min-worker-port=0", "--max-worker-port=0"]
    environment = {**ours, "HOME": str(home), "RAY_TMPDIR": str(tmp_path_factory.mktemp("ray"))}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *words]
    with (home / "said").open("w") as said:
        ray = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    made = Head(
        home, environment, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}", token
    )
    try:
        made.wait_until(lambda: answers(f"{made.dashboard}/api/gcs_healthz", ray))
        yield made
    finally:
        ray.send_signal(signal.SIGTERM)
        ray.wait(PATIENCE_S)


def answers(url: str, ray: subprocess.Popen) -> bool:
    assert ray.poll() is None
    try:
        return urllib.request.urlopen(url, timeout=30).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def last_step(folder: RunFolder) -> int:
    records = MetricsFollower(folder.output.metrics).poll()
    return max((record["step"] for record in records if record["kind"] == "train"), default=0)


def test_a_job_is_seen_and_stopped(head, tmp_path):
    """Submitted, found in status, on the Train page and among the metrics, stopped with a checkpoint."""
    folder, config = RunFolder(tmp_path / "run"), str(tiny_file(tmp_path))
    address = ["--address", head.dashboard]
    submitted = head.call("submit", config, "steps=1000000", *address, "--no-wait")
    assert submitted.returncode == exit_codes.OK, submitted.stdout
    job = submitted.stdout.split()[-1]
    assert submitted.stdout == f"submitted {job}\n"
    head.wait_until(lambda: last_step(folder) >= 2)
    assert head.call("status", config, *address).stdout.startswith(f"{job}  RUNNING, since ")

    rank_0 = {f"ray_{name}" for name in prometheus.NAMES - {"nsa_gpu_memory_bytes"}}
    head.wait_until(lambda: all(f"\n{name}{{" in head.get(f"{head.metrics}/metrics") for name in rank_0))
    runs = json.loads(head.get(f"{head.dashboard}/api/train/v2/runs/v1"))["train_runs"]
    assert [run["status"] for run in runs] == ["RUNNING"]

    stopped = head.call("stop", config, *address)
    assert stopped.returncode == exit_codes.OK, stopped.stdout
    assert stopped.stdout.startswith(f"{job}  SUCCEEDED, exit code 0")
    assert folder.checkpointed_step() == last_step(folder) > 0
    logs = head.call("logs", config, *address).stdout
    assert f"stopped after step {last_step(folder)} of 1000000" in logs
    assert "\x1b" not in logs


def test_submit_waits_and_ends_as_the_run_does(head, tmp_path):
    config, address = str(tiny_file(tmp_path)), ["--address", head.dashboard]
    done = head.call("submit", config, "steps=3", *address)
    assert done.returncode == exit_codes.OK, done.stdout
    assert "finished step 3 of 3" in done.stdout
    again = head.call("submit", config, "steps=3", *address)  # a folder that holds a run, which only the head sees
    assert again.returncode == exit_codes.BAD_CONFIG
    assert "resume=true" in again.stdout


def test_a_run_joins_it(head, tmp_path):
    joined = head.call("train", str(tiny_file(tmp_path)), "steps=3", f"launch.address={head.gcs}")
    assert joined.returncode == exit_codes.OK, joined.stdout
    assert "InvalidAuthToken" not in joined.stdout
    assert "first training record " in joined.stdout


def test_without_its_token_nobody_joins(head, tmp_path):
    stranger = {**head.environment, "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "nsa_launch", "train", str(tiny_file(tmp_path)), f"launch.address={head.gcs}"]
    refused = subprocess.run(command, env=stranger, timeout=PATIENCE_S, capture_output=True, text=True)
    assert refused.returncode == exit_codes.BAD_CONFIG
    assert "asks for a token, and none was found" in refused.stderr
    assert "copy ~/.ray/auth_token of its head here" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
