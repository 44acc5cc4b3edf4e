"""A rank's exception is a refusal only where a check of the configuration raised it; any other is a failure."""

import json
import os

import pytest

from launch_cases import Command, tiny, tiny_file
from nsa_dist.train.data.corpus import file_digest
from nsa_dist.train.files.records import MetricsFollower
from nsa_dist.train.refused import Refused
from nsa_launch import exit_codes
from nsa_launch.on_ray import worker
from nsa_launch.processes import decide
from nsa_launch.ranks import rank
from nsa_launch.run_folder import RunFolder, claimed
from train_cases import write_texts


class Here:
    """What a worker asks Ray."""

    def get_world_rank(self) -> int:
        return 0

    def get_node_id(self) -> str:
        return "node"

    def get_node_labels(self) -> dict:
        return {}


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """The events and the rank's log after its training raised the given exception."""
    monkeypatch.setattr(worker.ray.train, "get_context", Here)
    monkeypatch.setattr(worker.ray, "get_runtime_context", Here)
    monkeypatch.setattr(worker.rank_output, "redirect", lambda *_: None)  # pytest has these descriptors
    monkeypatch.setenv("A_KEY", "")
    config = tiny(tmp_path)

    def raising(error: Exception) -> list[dict]:
        def run(*_):
            assert os.environ["A_KEY"] == "a secret"  # there before anything of a rank is
            raise error

        monkeypatch.setattr(rank, "run", run)
        with claimed(config) as folder:
            pass
        with pytest.raises(type(error)):
            worker.run_rank(worker.payload(config, decide(config, 0), "launch"), {"A_KEY": "a secret"})
        begun, *events = MetricsFollower(folder.launches).poll()
        assert begun["event"] == "processes"
        return events

    return raising


def test_what_a_check_refuses_is_a_refusal(answer, capsys):
    (event,) = answer(Refused("take another"))
    assert (event["event"], event["reason"]) == ("refused", "take another")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("offset must be non-negative and no greater than buffer length (25)"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        json.JSONDecodeError("Invalid control character at", "{", 1),
        RuntimeError("x"),
        OSError(28, "No space left on device"),
        KeyError("samples"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_other_exception_is_a_failure_with_its_traceback_in_the_log(answer, capsys, error):
    assert answer(error) == []
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert "worker.py" in said
    assert type(error).__name__ in said


@pytest.mark.slow
def test_a_truncated_file_of_tokens_is_tried_again_and_named(tmp_path):
    """The texts as a full disk left them: shorter than their index, and their digest is that of what is there."""
    command = Command(tiny_file(tmp_path, write_texts(tmp_path / "texts")), tmp_path)
    folder = RunFolder(tmp_path / "run")
    secret = "hunter2-hunter2"
    with command.started("steps=3", f"launch.env.HF_TOKEN={secret}") as launch:
        assert launch.wait(command.patience_s) == exit_codes.OK
    tokens, listing = folder.output.data / "train.bin", folder.output.data / "corpus.json"
    with tokens.open("r+b") as file:
        file.truncate(1000)
    written = json.loads(listing.read_text())
    written["sha256"]["train.bin"] = file_digest(tokens)
    listing.write_text(json.dumps(written))
    with command.started("steps=6", "resume=true", "max_failures=1", "launch.env={}") as launch:
        assert launch.wait(command.patience_s) == exit_codes.FAILED
    assert len(command.events("failure")) == 2
    assert not command.events("refused")
    assert "train.bin has 1000 bytes" in command.said()
    assert "Traceback" in folder.rank_log(0).read_text()
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
