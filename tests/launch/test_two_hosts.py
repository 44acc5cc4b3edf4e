"""Two hosts, as far as one machine goes: a late one, a cable pulled in mid-step, one that is gone for good.

With Ray and without. The run goes on with the losses of a run that nothing happened to, or says what it waits for.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launch_cases import Command, tiny_file
from nsa_dist.train.files.records import MetricsFollower, read_metrics
from nsa_launch import exit_codes
from nsa_launch.run_folder import RunFolder
from train_cases import write_texts
from two_hosts import Host, connect, missing, two_hosts, wait_for

pytestmark = pytest.mark.slow
STEPS = 120
WORDS = [
    "launch.nodes=2", "processes_per_node=1", "cpus_per_process=1", "allow_split_groups=true", "max_failures=8",
    "checkpoint_interval=10", "keep_checkpoints=3",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if why := missing():
        pytest.skip(f"two hosts cannot be made on this machine: {why}")


@dataclass
class Run:
    """One run over both, and what has become of it."""

    config: Path
    folder: RunFolder
    home: Path

    def step(self) -> int:
        records = read_metrics(self.folder.output.metrics, "train")
        return records[-1]["step"] if records else 0

    def num_steps(self) -> int:
        """Made so far, those that were made again counted again."""
        return sum(record.get("kind") == "train" for record in MetricsFollower(self.folder.output.metrics).poll())

    def losses(self) -> list[tuple[int, float]]:
        return [(r["step"], r["loss"]) for r in read_metrics(self.folder.output.metrics, "train")]

    def events(self, kind: str) -> list[dict]:
        return [event for event in MetricsFollower(self.folder.launches).poll() if event["event"] == kind]

    def said(self, host: str = "host-a") -> str:
        return (self.home / f"{host}.out").read_text()


@contextmanager
def a_run(home: Path) -> Iterator[tuple[Run, Host, Host]]:
    config = tiny_file(home, write_texts(home / "texts"))
    with two_hosts(home) as (first, second):
        yield Run(config, RunFolder(home / "run"), home), first, second


def cable_is_out_for_a_while(run: Run, host: Host, steps: int, launch: subprocess.Popen, said: Path) -> None:
    """Until no step is made any more; then so many more are made, and nobody has noticed."""
    host.set_link("down")
    stood = [run.step(), -1]
    while stood[-1] != stood[-2]:
        subprocess.run(["sleep", "2"], check=True)
        stood.append(run.step())
    host.set_link("up")
    wait_for("steps after the cable is back", lambda: run.step() > stood[-1] + steps, launch, said)
    assert len(run.events("start")) == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple[int, float]]:
    home = tmp_path_factory.mktemp("undisturbed")
    command = Command(tiny_file(home, write_texts(home / "texts")), home)
    command.torchrun(f"steps={STEPS}")
    return Run(home, RunFolder(home / "run"), home).losses()


# --- without Ray ------------------------------------------------------------------------------------------------------


def torchrun(run: Run, host: Host, *more: str) -> subprocess.Popen:
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host-a:29500", "--rdzv-id", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, "--nproc-per-node", "1", "--max-restarts", "3"]
    words = [*WORDS, f"steps={STEPS}", *more]
    return host.start([*command, "-m", "nsa_launch.torchrun", str(run.config), *words], run.home / f"{host.name}.out")


def test_without_ray(tmp_path, undisturbed):
    """The second host comes late; the cable is out for a while; the second host dies, and is started again."""
    with a_run(tmp_path) as (run, first, second):
        said = tmp_path / "host-a.out"
        launch = torchrun(run, first)
        wait_for("the first host to wait", said.read_text, launch, said)
        torchrun(run, second)
        wait_for("steps over both", lambda: run.step() >= 3, launch, said)

        cable_is_out_for_a_while(run, second, 10, launch, said)

        second.lose()
        wait_for("the failure to be said", lambda: "torchrun starts all ranks again" in run.said(), launch, said)
        assert "end it on all of them, and start it again with resume=true" in run.said()
        for process in psutil.Process(launch.pid).children():
            process.terminate()
        launch.wait(600)
        second.boot(tmp_path / "hosts")
        connect(first, second)
        launches = [torchrun(run, host, "resume=true") for host in (first, second)]
        assert [launch.wait(600) for launch in launches] == [exit_codes.OK, exit_codes.OK], run.said()
    assert run.events("start")[-1]["step"] > 0
    assert run.losses() == undisturbed


# --- with Ray ---------------------------------------------------------------------------------------------------------


def ray_node(run: Run, host: Host, is_head: bool) -> subprocess.Popen:
    where = ["--head", "--port=6379"] if is_head else ["--address=host-a:6379"]
    options = [f"--node-ip-address={host.address}", "--num-cpus=1", "--object-store-memory=100000000", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, *options, "--disable-usage-stats"]
    return host.start(command, run.home / f"{host.name}.ray")


def test_with_ray(tmp_path, undisturbed):
    """A late node; the cable out for a moment, then until the node is given up; a host that dies."""
    with a_run(tmp_path) as (run, first, second):
        said, ray_said = tmp_path / "host-a.out", tmp_path / "host-a.ray"
        head = ray_node(run, first, is_head=True)
        wait_for("Ray's head", lambda: "Ray runtime started" in ray_said.read_text(), head, ray_said)
        words = [
            *WORDS, f"steps={STEPS}", "launch.address=host-a:6379", "process_group_timeout_s=30", "start_timeout_s=30",
            "resources_timeout_s=600",
        ]  # fmt: skip
        command = [sys.executable, "-m", "nsa_launch", "train", str(run.config)]
        launch = first.start([*command, *words], said)
        wait_for("what is lacking to be said", lambda: "the cluster lacks 2 CPUs" in run.said(), launch, said)
        node = ray_node(run, second, is_head=False)
        wait_for("steps over both", lambda: run.step() >= 3, launch, said)

        cable_is_out_for_a_while(run, second, 5, launch, said)

        second.set_link("down")
        wait_for("the failure to be said", lambda: run.events("failure"), launch, said)
        wait_for("the lost node to be missed", lambda: run.said().count("the cluster lacks") >= 2, launch, said)
        second.set_link("up")
        wait_for("the node to end that was given up", lambda: node.poll() is not None, launch, said)
        ray_node(run, second, is_head=False)
        before = run.num_steps()
        wait_for("steps over both again", lambda: run.num_steps() > before + 12, launch, said)

        second.lose()
        lacking = run.said().count("the cluster lacks")
        wait_for("the lost host to be missed", lambda: run.said().count("the cluster lacks") > lacking, launch, said)
        second.boot(tmp_path / "hosts")
        connect(first, second)
        ray_node(run, second, is_head=False)
        assert launch.wait(900) == exit_codes.OK, run.said()
    assert run.losses() == undisturbed


def test_a_node_that_never_comes(tmp_path):
    """The run ends with the exit code that asks to be submitted again."""
    with a_run(tmp_path) as (run, first, _):
        said, ray_said = tmp_path / "host-a.out", tmp_path / "host-a.ray"
        head = ray_node(run, first, is_head=True)
        wait_for("Ray's head", lambda: "Ray runtime started" in ray_said.read_text(), head, ray_said)
        words = [*WORDS, "launch.address=host-a:6379", "start_timeout_s=15", "resources_timeout_s=15"]
        launch = first.start([sys.executable, "-m", "nsa_launch", "train", str(run.config), *words], said)
        assert launch.wait(600) == exit_codes.NO_RESOURCES, run.said()
        assert "the cluster lacks 2 CPUs, of which it has 1; waiting up to 15 s for a node" in run.said()
        assert "Traceback" not in run.said()
