"""The cluster files parse, and the commands in them are commands we have."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from launch_cases import tiny_file
from nsa_launch.config import load

LAUNCHERS = Path(__file__).parents[2] / "launchers"


@pytest.fixture(scope="module")
def job() -> dict:
    return yaml.safe_load((LAUNCHERS / "k8s/rayjob.yaml").read_text())


def test_the_rayjob_asks_for_the_nodes_it_names(tmp_path, job):
    program, command, _, *words = shlex.split(job["spec"]["entrypoint"])
    assert [program, command] == ["nsa-dist", "train"]
    config = load(tiny_file(tmp_path), [*words, "global_batch_size=8"])
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert config.launch.nodes == group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert str(config.processes_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.processes_per_node * config.launch.cpus_per_process <= int(container["resources"]["limits"]["cpu"])
    assert config.run.resume


def test_every_pod_mounts_the_runs(job):
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["runs"] == "/runs"
            assert set(mounts) <= volumes


def test_no_rank_fits_on_the_head(job):
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert (head["num-cpus"], head["num-gpus"]) == ("0", "0")


def test_the_slurm_script_is_shell():
    subprocess.run(["bash", "-n", str(LAUNCHERS / "slurm/train.sbatch")], check=True)
