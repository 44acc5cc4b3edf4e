"""Files for clusters: rendered from a configuration, with fields that KubeRay has and words that we take."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from launch_cases import tiny_file
from nsa_launch import cli, exit_codes
from nsa_launch.config import load
from rayjob_fields import FIELDS, unknown

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
SHIPPED = [str(ROOT / "configs/long-1m.yaml"), "output_dir=/runs/long-1m", "launch.nodes=2", "global_batch_size=2"]
SHIPPED += ["launch.cpus_per_process=8"]


def rendered(capsys, *words: str, code: int = exit_codes.OK) -> str:
    assert cli.main(["render", *words]) == code
    said = capsys.readouterr()
    return said.out if code == exit_codes.OK else said.err


@pytest.fixture
def manifest(capsys):
    """(the configuration that goes along, the RayJob) of some words."""

    def render(*words: str) -> tuple[dict, dict]:
        config_map, job = yaml.safe_load_all(rendered(capsys, "k8s", *words))
        assert (config_map["kind"], job["kind"]) == ("ConfigMap", "RayJob")
        assert {name: unknown(job[name]) for name in ("spec",)} == {"spec": []}
        return yaml.safe_load(config_map["data"]["config.yaml"]), job["spec"]

    return render


@pytest.mark.parametrize(("kind", "file"), [("k8s", "k8s/rayjob.yaml"), ("slurm", "slurm/train.sbatch")])
def test_the_files_in_the_repository_are_rendered(capsys, kind, file):
    assert (LAUNCHERS / file).read_text() == rendered(capsys, kind, *SHIPPED)


def test_the_rayjob_asks_for_the_nodes_it_names(tmp_path, manifest):
    raw, spec = manifest(*SHIPPED)
    sent = tmp_path / "config.yaml"
    sent.write_text(yaml.safe_dump(raw))
    config = load(sent)
    assert config.run.resume
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert config.launch.nodes == group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    assert config.processes_per_node == 8 == int(limits["nvidia.com/gpu"])
    assert config.processes_per_node * config.launch.cpus_per_process <= int(limits["cpu"])
    assert spec["backoffLimit"] == 0  # a cluster of GPUs is not built again for a typo


def test_the_entrypoint_is_a_command_of_ours_on_a_file_that_is_mounted(manifest):
    _, spec = manifest(*SHIPPED)
    program, *words = shlex.split(spec["entrypoint"])
    arguments = cli.parser().parse_args(words)
    assert (program, words[0]) == ("nsa-dist", "train")
    for pod in pods(spec):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == set(volumes)
            assert "configMap" in volumes[mounts[str(arguments.config.parent)]]
            assert "persistentVolumeClaim" in volumes[mounts["/runs"]]


def pods(spec: dict) -> list[dict]:
    cluster = spec["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_no_rank_fits_on_the_head(manifest):
    _, spec = manifest(*SHIPPED)
    head = spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert (head["num-cpus"], head["num-gpus"]) == ("0", "0")


def test_probes_need_nothing_of_the_image(manifest):
    _, spec = manifest(*SHIPPED)
    for pod in pods(spec):
        for container in pod["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= set(container)
            assert all("httpGet" in container[probe] for probe in ("readinessProbe", "livenessProbe"))


def test_stops_have_time_for_a_checkpoint(manifest):
    _, spec = manifest(*SHIPPED, "launch.stop_grace_s=500")
    head = pods(spec)[0]["containers"][0]["env"]
    assert [int(variable["value"]) > 500 for variable in head] == [True]
    assert all(pod["terminationGracePeriodSeconds"] > 500 for pod in pods(spec))


def test_networks_are_asked_for_and_not_assumed(manifest):
    _, spec = manifest(*SHIPPED)
    assert "eth0" not in json.dumps(spec)
    _, spec = manifest(*SHIPPED, "--rdma", "rdma/hca=8", "--interface", "ib0")
    (container,) = pods(spec)[1]["containers"]
    assert container["resources"]["limits"]["rdma/hca"] == "8"
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert {"name": "NCCL_SOCKET_IFNAME", "value": "ib0"} in container["env"]


def test_fields_that_kuberay_lacks_are_found(manifest):
    _, spec = manifest(*SHIPPED)
    pod = pods(spec)[1]
    pod["containers"][0]["imagePullpolicy"] = "Always"
    del pod["volumes"][0]["name"]
    del spec["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"]
    assert set(unknown(spec)) == {
        "template.spec.containers[].imagePullpolicy",
        "template.spec.volumes[].name",
        "rayClusterSpec.workerGroupSpecs[].minReplicas",
    }
    assert len(FIELDS) > 20


@pytest.mark.parametrize(
    ("kind", "words", "remedy"),
    [
        ("k8s", ["output_dir=runs/x"], r"output_dir=/runs/x"),
        ("slurm", ["output_dir=~/x"], r"absolute path on storage that every node mounts"),
        ("k8s", ["output_dir=/other/x"], r"output_dir=/runs/x, or give another --mount"),
        ("k8s", ["output_dir=/runs/x", "data.folder=texts"], r"data\.folder=/runs/texts"),
        ("slurm", ["output_dir=/runs/x", "launch.env.HF_TOKEN=x"], r"give launch\.env\.HF_TOKEN=null"),
        ("k8s", ["output_dir=/runs/x", "launch.address=local"], r"give launch\.address=auto"),
        ("slurm", ["output_dir=/runs/x", "launch.processes_per_node=3"], r"start 4 processes"),
    ],
)
def test_what_means_nothing_elsewhere_is_refused(tmp_path, capsys, kind, words, remedy):
    said = rendered(capsys, kind, str(tiny_file(tmp_path)), *words, code=exit_codes.BAD_CONFIG)
    assert re.search(remedy, said)
    assert len(said.splitlines()) == 1


class Slurm:
    """The batch script among stand-ins for Slurm's and Ray's commands, which write down what they were asked."""

    def __init__(self, folder: Path, script: str, step: str) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "bin").mkdir()
        self._tool("srun", f'echo "$@" >> {folder}/asked\n{step}\n')
        self._tool("scontrol", f'echo "$@" >> {folder}/asked\n[ "$1" != show ] || echo node-1\n')
        # Waits between two looks are short here.
        (folder / "job.sbatch").write_text(script.replace("sleep 5 &", "sleep 0.05 &"))

    def _tool(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)

    def started(self, **environment: str) -> subprocess.Popen:
        base = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(self.folder / "job.sbatch"), "run.steps=5"],
            env={**os.environ, **base, "PATH": path, **environment},
        )

    def asked(self) -> str:
        return (self.folder / "asked").read_text()

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 300
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)  # between two looks


@pytest.fixture
def slurm(tmp_path, capsys):
    """The script of a tiny run whose step is a few lines of shell."""

    def make(step: str) -> Slurm:
        words = [str(tiny_file(tmp_path)), f"output_dir={tmp_path / 'run'}", "launch.nodes=2", "global_batch_size=2"]
        return Slurm(tmp_path, rendered(capsys, "slurm", *words, "launch.processes_per_node=2"), step)

    return make


# A run that takes an early STOP away, is up then, and ends at the next one.
OBEDIENT = """until [ -e {run}/STOP ]; do touch {run}/ready; sleep 0.05; done
rm -f {run}/STOP; touch {run}/up
until [ -e {run}/STOP ]; do sleep 0.05; done"""


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_stops_a_run_however_early_the_signal_comes(slurm, tmp_path, number, requeued):
    job = slurm(OBEDIENT.format(run=tmp_path / "run"))
    script = job.started()
    job.wait_for(job.run / "ready")
    script.send_signal(number)
    assert script.wait(300) == 0
    assert (job.run / "up").exists()
    assert ("requeue 7" in job.asked()) == requeued


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, "0", False), (1, "0", False), (2, "0", False), (75, "0", True), (75, "100", False)],
)
def test_slurm_queues_again_what_found_no_room(slurm, code, restarts, requeued):
    job = slurm(f"exit {code}")
    assert job.started(SLURM_RESTART_COUNT=restarts).wait(300) == code
    assert ("requeue 7" in job.asked()) == requeued


def test_slurms_command_is_ours_and_its_configuration_is_the_one_that_was_rendered(slurm, tmp_path):
    job = slurm("exit 0")
    assert job.started().wait(300) == 0
    (asked,) = [line for line in job.asked().splitlines() if "nsa-dist" in line]
    words = asked.partition("nsa-dist ")[2].split()
    arguments = cli.parser().parse_args(words)
    config = load(arguments.config, arguments.overrides)
    assert config.run.resume
    assert config.run.steps == 5
    assert config.launch.address == "node-1:6379"
    assert (config.launch.nodes, config.processes_per_node) == (2, 2)


def test_slurms_directives(capsys):
    script = rendered(capsys, "slurm", *SHIPPED, "--partition", "gpu")
    found = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if "#SBATCH" in line
    )
    assert found["mem"] == "0"
    assert found["open-mode"] == "append"
    assert found["gpus-per-node"] == "8"
    assert found["cpus-per-task"] == "64"
    assert found["partition"] == "gpu"
    assert {"exclusive", "requeue"} <= set(found)


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text()
    whole = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def test_the_dockerfile_is_one():
    found = instructions()
    assert found[0][0] == "FROM"
    assert {word for word, _ in found} <= {"FROM", "RUN", "COPY", "WORKDIR", "USER", "CMD"}
    for word, rest in found:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
    (command,) = [json.loads(rest) for word, rest in found if word == "CMD"]
    assert command[0] == "nsa-dist"
    cli.parser().parse_args(command[1:])


def test_the_dockerfile_copies_what_the_package_is_built_of(tmp_path):
    ignored = {line.rstrip("/") for line in (ROOT / ".dockerignore").read_text().split()}
    copied = []
    for word, rest in instructions():
        if word == "RUN" and rest.startswith("pip"):
            (extra,) = re.findall(r'"\.\[(\w+)\]"', rest)
            break
        if word == "COPY":
            *sources, target = rest.split()
            copied += [(source, target) for source in sources]
    for source, target in copied:
        assert source not in ignored
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / source, tmp_path / target)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    assert (tmp_path / project["readme"]).exists()
    build = "import setuptools.build_meta as b; print(*b.prepare_metadata_for_build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
