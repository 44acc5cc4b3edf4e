"""Which Ray is joined, with which token, and how soon it is known that none is there."""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from launch_cases import tiny
from nsa_launch.on_ray import driver
from nsa_launch.on_ray.joining import address, reach, tokens
from nsa_launch.on_ray.joining.address import Address
from nsa_launch.processes import Machine, decide

HERE = Address("127.0.0.1:6379", "launch.address=127.0.0.1:6379")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """No Ray and no token of whoever runs the tests."""
    for name in ("RAY_ADDRESS", tokens.MODE, tokens.TOKEN, tokens.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("configured", "of_environment", "text", "origin"),
    [
        ("auto", "head:6379", "head:6379", "RAY_ADDRESS=head:6379 of the environment"),
        ("other:6380", "head:6379", "other:6380", "launch.address=other:6380"),
        ("[::1]:6379", None, "[::1]:6379", "launch.address=[::1]:6379"),
    ],
)
def test_a_setting_names_the_ray_to_join(monkeypatch, configured, of_environment, text, origin):
    if of_environment:
        monkeypatch.setenv("RAY_ADDRESS", of_environment)
    assert address.find(configured) == Address(text, origin)


@pytest.mark.parametrize(
    ("configured", "of_environment"), [("local", "head:6379"), ("auto", ""), ("auto", "local"), ("auto", None)]
)
def test_otherwise_the_run_starts_its_own(monkeypatch, configured, of_environment):
    if of_environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", of_environment)
    assert address.find(configured) is None


@pytest.mark.parametrize(
    ("configured", "remedy"),
    [
        ("ray://head:10001", r"nsa-dist submit CONFIG\.yaml --address http://HEAD:8265"),
        ("http://head:8265", r"nsa-dist submit CONFIG\.yaml --address http://head:8265"),
        ("head", r"launch\.address=10\.0\.0\.1:6379"),
        ("head:many", r"launch\.address=10\.0\.0\.1:6379"),
        (":6379", r"launch\.address=10\.0\.0\.1:6379"),
    ],
)
def test_an_address_that_names_no_head_is_refused(configured, remedy):
    with pytest.raises(ValueError, match=remedy):
        address.find(configured)


def test_nobody_listens(tmp_path, monkeypatch):
    with socket.socket() as taken:  # bound, so nobody else listens there meanwhile, and not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            ConnectionError, match=r"refused\), where RAY_ADDRESS=.* of the environment .*address=local"
        ):
            driver.plan(tiny(tmp_path), Machine(cores=2, gpus=0))


def test_who_listens_and_never_answers_is_given_up_on(monkeypatch):
    monkeypatch.setattr(reach, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = Address(f"127.0.0.1:{mute.getsockname()[1]}", "launch.address=...")
        with pytest.raises(ConnectionError, match=r"not a word in 0\.5 s.*`ray start --head`"):
            reach.check(silent)


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({}, r"~/\.ray/auth_token; copy ~/\.ray/auth_token of its head here, or export RAY_AUTH_TOKEN_PATH=FILE"),
        ({"RAY_AUTH_TOKEN": "x"}, r"not the one in \$RAY_AUTH_TOKEN; export RAY_AUTH_TOKEN_PATH=FILE"),
        ({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_MODE": "disabled"}, r"export RAY_AUTH_MODE=token"),
    ],
)
def test_a_ray_that_wants_another_token(monkeypatch, environment, remedy):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(reach, "_ask", lambda *_: reach._UNWELCOME)
    with pytest.raises(ConnectionError, match=remedy):
        reach.check(HERE)


def test_the_users_token_is_sent(home, monkeypatch):
    assert tokens.of_joined_ray() == {}
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("x")
    assert tokens.of_joined_ray() == {"RAY_AUTH_MODE": "token"}
    assert tokens.of_own_ray() == {"RAY_AUTH_MODE": "token"}  # which Ray finds by itself
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert tokens.of_joined_ray() == {} == tokens.of_own_ray()


def test_a_ray_of_ones_own_gets_a_new_token_and_no_file(home):
    first, second = tokens.of_own_ray(), tokens.of_own_ray()
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first != second
    assert not list(home.iterdir())


def test_cuda_waits_for_gpus_that_a_cluster_may_get(tmp_path):
    config = tiny(tmp_path, "device=cuda")
    waiting = decide(config, 0, may_grow=True)
    assert (waiting.device, waiting.backend, waiting.gpus_each, waiting.per_node) == ("cuda", "nccl", 1, 2)
    assert decide(tiny(tmp_path, "device=auto"), 0, may_grow=True).device == "cpu"
    with pytest.raises(ValueError, match=r"processes_per_node=1 and more nodes"):
        decide(config, 1, may_grow=True)


def test_ray_keeps_an_interrupt_of_the_question(tmp_path):
    """Ctrl-C while a silent address is asked ends the command at once, with the shell's code and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        words = [str(tmp_path / "tiny.yaml"), f"launch.address=127.0.0.1:{mute.getsockname()[1]}"]
        tiny(tmp_path)
        command = [sys.executable, "-m", "nsa_launch", "train", *words]
        ctrl_c_is_heard = partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        )  # what runs in the background ignores it
        with subprocess.Popen(
            command, env=dict(os.environ), stderr=subprocess.PIPE, text=True, preexec_fn=ctrl_c_is_heard
        ) as asked:
            mute.settimeout(300)
            with mute.accept()[0]:  # it has begun to ask, and would go on asking another that hung up
                asked.send_signal(2)
                assert asked.wait(60) == 130
            assert asked.stderr is not None
            assert "Traceback" not in asked.stderr.read()
