"""The command line answers at once, and refuses with one message and exit code 2 before Ray starts."""

import subprocess
import sys

import pytest

from launch_cases import tiny, tiny_file
from nsa_launch import cli, exit_codes
from nsa_launch.on_ray import driver as ray_driver
from nsa_launch.run_folder import claimed


def test_help_imports_nothing_heavy():
    check = "import sys, nsa_launch.cli; print(sorted({'torch', 'ray', 'megatron', 'pydantic'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True) == "[]\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["stpes=3"], "did you mean run.steps?"),
        (["sequence_length=300"], "take sequence_length=512"),
        (["processes_per_node=3"], "start 4 processes"),
        (["processes_per_node=4000", "global_batch_size=2000"], "start fewer processes"),
        (["nodes=2", "processes_per_node=2", "global_batch_size=2"], "or take launch.nodes=1"),
        (["address=ray://head:10001"], "ray job submit"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, capsys, monkeypatch, words, remedy):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_driver, "run", lambda *_: pytest.fail("it was started"))
    assert cli.main(["train", str(tiny_file(tmp_path)), *words]) == exit_codes.BAD_CONFIG
    captured = capsys.readouterr()
    assert remedy in captured.err
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


def test_a_begun_run_is_refused(tmp_path, capsys):
    with claimed(tiny(tmp_path)) as folder:
        folder.output.set_latest(3)
    assert cli.main(["train", str(tiny_file(tmp_path))]) == exit_codes.BAD_CONFIG
    assert "resume=true" in capsys.readouterr().err


def test_another_run_is_refused_before_ray_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_driver, "run", lambda *_: pytest.fail("it was started"))
    with claimed(tiny(tmp_path)) as folder:
        folder.output.metrics.write_text('{"kind": "train", "step": 1}\n')
    words = ["resume=true", "seed=5", "window_len=128"]
    assert cli.main(["train", str(tiny_file(tmp_path)), *words]) == exit_codes.BAD_CONFIG
    said = capsys.readouterr().err
    assert "run.seed: the run has 1234, given is 5" in said
    assert "nsa.window_len: the run has 64, given is 128" in said


def test_doctor_finds_what_this_environment_has(capsys):
    assert cli.main(["doctor"]) == exit_codes.OK
    said = capsys.readouterr().out
    assert all(word in said for word in ("python", "cores", "torch", "megatron-core", "ray", "attention", "GPU"))


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    from nsa_launch.commands import doctor

    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "psutil" else version(name))
    assert cli.main(["doctor"]) == exit_codes.FAILED
    said = capsys.readouterr().out
    assert "MISSING psutil" in said
    assert "Megatron-core's checkpoints hang without it" in said
