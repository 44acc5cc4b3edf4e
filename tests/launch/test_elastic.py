"""Nodes that are gone for good: a run goes on with fewer whole replicas and grows again at a later restart."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray.train

from launch_cases import Command, tiny, tiny_file
from nsa_launch import exit_codes
from nsa_launch.on_ray.elastic import Elastic, whole_nodes
from nsa_launch.processes import allowed_nodes, check_fixed_size, check_groups, decide
from nsa_launch.run_folder import RunFolder

FOUR = ["nodes=4", "processes_per_node=2", "global_batch_size=4"]


class WorkerGroupStartupTimeoutError(Exception):
    """As Ray Train's own is called."""


NO_ROOM = ray.train.ControllerError(WorkerGroupStartupTimeoutError())
LOST = ray.train.WorkerGroupError("x", {0: RuntimeError()})


@pytest.mark.parametrize(
    ("words", "nodes"),
    [
        ([], [4]),
        (["min_data_parallel_size=1"], [4, 2, 1]),  # 3 replicas do not divide the batch
        (["min_data_parallel_size=2"], [4, 2]),
        (["min_data_parallel_size=1", "global_batch_size=12"], [4, 3, 2, 1]),
        # A replica over two nodes.
        (["min_data_parallel_size=1", "pipeline_model_parallel_size=2", "num_layers=2"], [4, 2]),
    ],
)
def test_numbers_of_nodes_make_whole_replicas_that_share_the_batch(tmp_path, words, nodes):
    assert allowed_nodes(tiny(tmp_path, *FOUR, *words)) == nodes


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ([*FOUR, "min_data_parallel_size=3"], "take one of 1, 2"),
        ([*FOUR, "min_data_parallel_size=4"], "take one of 1, 2"),
        ([*FOUR, "min_data_parallel_size=5"], "take one of 1, 2"),
        (["processes_per_node=4", "global_batch_size=2", "min_data_parallel_size=1"], "leave it out"),
    ],
)
def test_sizes_that_cannot_be_had_are_refused(tmp_path, words, remedy):
    with pytest.raises(ValueError, match=remedy):
        check_groups(tiny(tmp_path, *words))


def test_torchrun_decides_by_itself(tmp_path):
    with pytest.raises(ValueError, match=r"min_data_parallel_size=null, and torchrun --nnodes MIN:MAX"):
        check_fixed_size(tiny(tmp_path, *FOUR, "min_data_parallel_size=1"))
    check_fixed_size(tiny(tmp_path, *FOUR))


@pytest.fixture
def elastic(tmp_path) -> Elastic:
    words = [*FOUR, "min_data_parallel_size=1", "max_failures=2", "start_timeout_s=10", "shrink_after_s=10"]
    return Elastic(tiny(tmp_path, *words, "resources_timeout_s=30"))


def test_the_next_size(elastic):
    four = decide(elastic.config, 0)
    two, one = replace(four, nodes=2), replace(four, nodes=1)
    assert elastic.next(four, LOST, 3) == four  # the fourth may come back
    assert elastic.next(four, NO_ROOM, 3) == two
    assert elastic.next(two, NO_ROOM, 1) == one
    assert elastic.next(one, LOST, 4) == four  # they are back
    assert elastic.next(four, LOST, 4) is None  # one failure too many
    said = elastic.described(four, two)
    assert said.startswith("nodes: 4 -> 2; going on from the last checkpoint with 2 of 4 data-parallel replicas")
    assert "global batch and the order of samples stay" in said
    assert "later restart" in said
    assert "later restart" not in elastic.described(two, four)


def test_nodes_that_are_there_and_busy_are_waited_for(elastic):
    four = decide(elastic.config, 0)
    assert [elastic.next(four, NO_ROOM, 4) for _ in range(4)] == [four, four, four, None]


def test_other_errors_are_not_made_good(elastic):
    four = decide(elastic.config, 0)
    assert elastic.next(four, ray.train.ControllerError(ValueError()), 2) is None
    assert elastic.next(four, RuntimeError(), 2) is None


def test_nodes_that_count(tmp_path):
    config = tiny(
        tmp_path, *FOUR, "accelerator_type=H200", "launch.label_selector.zone=a", "launch.label_selector.x=!y"
    )
    good = {"Alive": True, "Resources": {"CPU": 1, "accelerator_type:H200": 1}, "Labels": {"zone": "a"}}
    bad = [
        good | {"Alive": False},
        good | {"Resources": {"CPU": 0.5, "accelerator_type:H200": 1}},
        good | {"Resources": {"CPU": 9}},
        good | {"Labels": {"zone": "b"}},
    ]
    assert whole_nodes([good, *bad, good], decide(config, 0), config.launch) == 2


@pytest.mark.slow
def test_a_run_loses_a_node_for_good_and_grows_when_one_comes(tmp_path, monkeypatch):
    """Two nodes of one replica each; one is taken away, later another one comes, then a rank is killed."""
    from ray.cluster_utils import Cluster

    undisturbed, elastic = tmp_path / "undisturbed", tmp_path / "elastic"
    for folder in (undisturbed, elastic):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    words = [
        "global_batch_size=2",
        "steps=100000",
        "checkpoint_interval=5",
        "cpus_per_process=0.5",
        "schedule=constant",
    ]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    node = SimpleNamespace(num_cpus=1, object_store_memory=80 * 2**20)
    try:
        _, going = (cluster.add_node(**vars(node)) for _ in range(2))
        command = Command(tiny_file(elastic), tmp_path)
        folder = RunFolder(elastic / "run")
        sizes = ["nodes=2", "processes_per_node=2", "min_data_parallel_size=1"]
        patience = ["start_timeout_s=60", "shrink_after_s=60"]
        with command.started(*words, *sizes, *patience, f"address={cluster.address}") as launch:
            command.wait_until(lambda: command.last_step() >= 7)
            cluster.remove_node(going, allow_graceful=False)
            command.wait_until(lambda: len(command.events("start")) == 2)
            num_records = len(command.train_records())
            command.wait_until(lambda: len(command.train_records()) > num_records + 6)
            cluster.add_node(**vars(node))
            cluster.wait_for_nodes()
            os.kill(json.loads(folder.topology.read_text())[0]["pid"], signal.SIGKILL)
            command.wait_until(lambda: len(command.events("start")) == 3)
            num_records = len(command.train_records())
            command.wait_until(lambda: len(command.train_records()) > num_records + 3)
            folder.stop.touch()
            assert launch.wait(command.patience_s) == exit_codes.OK
    finally:
        cluster.shutdown()
    assert [event["world_size"] for event in command.events("start")] == [4, 2, 4]
    assert [event["nodes"] for event in command.events("resized")] == [1, 2]
    assert "nodes: 2 -> 1; going on from the last checkpoint with 1 of 2" in command.said()

    records = command.train_records()
    assert all(record["samples"] == 2 * record["step"] for record in records)
    again = Command(tiny_file(undisturbed), tmp_path)
    again.torchrun(*words, f"steps={command.last_step()}")
    losses = {record["step"]: record["loss"] for record in again.train_records()}
    for record in records:
        assert record["loss"] == pytest.approx(losses[record["step"]], rel=1e-3)
    assert {record["step"] for record in records} == set(losses)
