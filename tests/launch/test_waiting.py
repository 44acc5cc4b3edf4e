"""What is said while a run waits: for room in a cluster, or for torchrun to start it again."""

import threading

import pytest
import ray
import ray.util

from launch_cases import tiny
from nsa_launch import torchrun
from nsa_launch.on_ray import room, session
from nsa_launch.on_ray.room import Room


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    return now


def looked(watched: Room) -> None:
    """At the cluster, until it has answered, and at its answer."""
    watched.look(ranks_are_up=False)
    if watched._question is not None:
        watched._question.thread.join()
    watched.look(ranks_are_up=False)


def test_what_a_cluster_lacks_is_said_once_until_it_changes(clock):
    said: list[str] = []
    missing = [""]
    watched = Room(said.append, lambda: missing[0], 120.0)
    one, none = "2 CPUs, of which it has 1", "2 CPUs, of which it has 0"
    for text in (one, one, none, "", none):
        missing[0] = text
        clock[0] += 10
        looked(watched)
    assert said == [f"the cluster lacks {text}; waiting up to 120 s for a node" for text in (one, none, none)]


def test_it_is_asked_seldom_and_by_one_thread_at_a_time(clock):
    asked: list[float] = []
    watched = Room(lambda _: None, lambda: asked.append(clock[0]) or "", 1.0)
    for _ in range(100):
        clock[0] += 0.2
        looked(watched)
    assert 8 <= len(asked) <= 11


def test_a_cluster_that_does_not_answer_keeps_nobody_waiting(clock):
    """As Ray's does while its head is out of reach; what it says of the time before is not news."""
    said: list[str] = []
    answer = threading.Event()
    watched = Room(said.append, lambda: answer.wait() and "a GPU", 1.0)
    for _ in range(100):
        clock[0] += 10
        watched.look(ranks_are_up=False)
    watched.look(ranks_are_up=True)
    answer.set()
    assert not said
    clock[0] += 10
    looked(watched)
    assert said == ["the cluster lacks a GPU; waiting up to 1 s for a node"]


def test_what_ray_fails_to_say_is_asked_again(clock):
    said: list[str] = []
    answers = iter([ConnectionError("gone"), "a GPU"])

    def missing() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watched = Room(said.append, missing, 1.0)
    for _ in range(2):
        clock[0] += 10
        looked(watched)
    assert said == ["the cluster lacks a GPU; waiting up to 1 s for a node"]


def test_ranks_that_are_up_have_room(clock):
    asked: list[float] = []
    watched = Room(lambda _: None, lambda: asked.append(clock[0]) or "", 1.0)
    for _ in range(10):
        clock[0] += 10
        watched.look(ranks_are_up=True)
    assert not asked


def test_what_a_dead_controller_reserved_is_released_and_nobody_elses(monkeypatch):
    ours, theirs = (unique * 14 + job for unique, job in (("ab", "01000000"), ("cd", "02000000")))
    table = {ours: {"state": "CREATED"}, "ef" * 14 + "01000000": {"state": "REMOVED"}, theirs: {"state": "CREATED"}}
    removed: list[str] = []

    class Context:
        def get_job_id(self) -> str:
            return "01000000"

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray.util, "placement_group_table", lambda: table)
    monkeypatch.setattr(ray.util, "remove_placement_group", lambda group: removed.append(group.id.hex()))
    assert session.release_placement() == 1
    assert removed == [ours]


@pytest.mark.parametrize(
    ("nodes", "restarts", "said"),
    [
        (
            2,
            0,
            r"\(1 of 3 times\); if one of the 2 nodes is gone .*end it on all of them, and start it again with resume",
        ),
        (1, 2, r"again from the last checkpoint \(3 of 3 times\)$"),
        (2, 3, r"no restart left \(--max-restarts 3\); go on with resume=true"),
    ],
)
def test_torchruns_next_step_is_said_by_the_rank_that_failed(tmp_path, monkeypatch, nodes, restarts, said):
    for name, value in {"RANK": 1, "TORCHELASTIC_RESTART_COUNT": restarts, "TORCHELASTIC_MAX_RESTARTS": 3}.items():
        monkeypatch.setenv(name, str(value))
    config = tiny(tmp_path, f"launch.nodes={nodes}", "allow_split_groups=true")
    text = torchrun._consequence(config, RuntimeError("first\nConnection closed by peer"))
    assert text.startswith("rank 1 on ")
    assert "failed (Connection closed by peer)" in text
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(text)
