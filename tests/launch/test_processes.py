"""Ranks against replicas, nodes, cores and GPUs: arithmetic that refuses before anything is started."""

import pytest

from launch_cases import tiny
from nsa_launch.processes import Machine, check_groups, check_machine, decide


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["processes_per_node=3"], "start 4 processes"),
        (["processes_per_node=4"], "take global_batch_size=2"),
        (["nodes=2", "processes_per_node=1"], "take processes_per_node=2, name a node label"),
        (["nodes=2", "processes_per_node=3", "global_batch_size=3"], "take processes_per_node=4"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tmp_path, words, remedy):
    with pytest.raises(ValueError, match=remedy):
        check_groups(tiny(tmp_path, *words))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nodes=2", "processes_per_node=2", "global_batch_size=2"],
        ["nodes=2", "processes_per_node=1", "allow_split_groups=true"],
        ["nodes=2", "processes_per_node=1", "nvlink_label=domain"],
    ],
)
def test_groups_that_fit_or_may_split_pass(tmp_path, words):
    check_groups(tiny(tmp_path, *words))


def test_auto_takes_gpus_where_there_are_some(tmp_path):
    config = tiny(tmp_path, "device=auto")
    on_cpu, on_gpu = decide(config, 0), decide(config, 8)
    assert (on_cpu.device, on_cpu.backend, on_cpu.gpus_each) == ("cpu", "gloo", 0)
    assert (on_gpu.device, on_gpu.backend, on_gpu.gpus_each) == ("cuda", "nccl", 1)


def test_ranks_do_not_share_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"ranks cannot share one, .*take processes_per_node=1 and more nodes"):
        decide(tiny(tmp_path, "device=cuda"), 1)


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no GPU is visible here; take launch\.device=cpu"):
        decide(tiny(tmp_path, "device=cuda"), 0)


def test_more_ranks_than_cores_are_refused(tmp_path):
    config = tiny(tmp_path, "processes_per_node=8", "global_batch_size=4", "cpus_per_process=1")
    with pytest.raises(ValueError, match=r"need 8 cores, and this machine lets us use 4; .*cpus_per_process=0\.5"):
        check_machine(decide(config, 0), Machine(cores=4, gpus=0))
    check_machine(decide(config, 0), Machine(cores=8, gpus=0))


def test_one_machine_is_one_node(tmp_path):
    config = tiny(tmp_path, "nodes=2", "processes_per_node=2", "global_batch_size=2")
    with pytest.raises(ValueError, match=r"give launch\.address=HOST:PORT of a cluster, or take launch\.nodes=1"):
        check_machine(decide(config, 0), Machine(cores=64, gpus=0))


def test_threads_are_whole_and_at_least_one(tmp_path):
    assert decide(tiny(tmp_path, "cpus_per_process=0.5"), 0).threads_each == 1
    assert decide(tiny(tmp_path, "cpus_per_process=2.5"), 0).threads_each == 2
