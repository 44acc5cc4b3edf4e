"""The command line answers at once, and refuses with one message and exit code 2 before Ray starts."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nsa_dist
from launch_cases import tiny, tiny_file
from nsa_kernels.bench import arguments as kernel_arguments
from nsa_launch import cli, exit_codes
from nsa_launch.on_ray import driver as ray_driver
from nsa_launch.run_folder import claimed

REPOSITORY = Path(__file__).parents[2]


def test_help_imports_nothing_heavy():
    check = "import sys, nsa_launch.cli as c; c.parser(); "
    check += "print(sorted({'torch', 'triton', 'ray', 'megatron', 'pydantic', 'yaml'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True) == "[]\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code == 0


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands, and of theirs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    """The words of each example at the end of --help."""
    title, *lines = parser.format_help().split("\nexample", 1)[1].splitlines()
    assert title in (":", "s:")
    return [shlex.split(line, comments=True) for line in lines]


PARSERS = {parser.prog: parser for parser in parsers(cli.parser())}


def test_there_are_all_the_commands():
    names = ("train", "plan", "config", "report", "bench", "bench cp", "bench kernels", "bench decode", "doctor")
    names += ("export", "generate", "submit", "status", "logs", "stop", "render", "data", "data build", "data check")
    names += ("convert", "bench generate")
    assert PARSERS.keys() == {"nsa-dist", *(f"nsa-dist {name}" for name in names)}


@pytest.mark.parametrize("prog", PARSERS)
def test_every_help_ends_with_examples_that_parse(prog):
    found = examples(PARSERS[prog])
    assert found
    for words in found:
        command, shell = (words[: words.index(">")], True) if ">" in words else (words, False)
        assert " ".join(command).startswith(prog), words
        arguments = cli.parser().parse_args(command[1:])
        assert callable(arguments.command)
        assert not shell or command[1] in ("config", "render")


def test_the_kernels_script_has_examples_that_parse():
    parser = kernel_arguments.parser()
    for words in examples(parser):
        assert " ".join(words).startswith(parser.prog)
        parser.parse_args(words[2:])


def test_help_of_the_kernels_benchmark(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "kernels", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--compare FILE" in said
    assert "table,targets,kinds,lengths,groups,dims,packs,full" in said


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nsa-dist {nsa_dist.__version__}\n"


@pytest.mark.parametrize("words", [["config", "--keys"], ["plan", "configs/long-1m.yaml"], ["doctor"]])
def test_who_stops_reading_gets_no_traceback(words):
    """As in `nsa-dist ... | head -1`, but that nothing at all is read."""
    code = "import sys; from nsa_launch.cli import main; sys.exit(main())"
    command = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    command.stdout.close()
    _, said = command.communicate(timeout=120)
    assert command.returncode != 0
    assert said == b""


def test_a_package_that_is_not_installed_is_named():
    """In a process of its own: here the command's modules may have been imported with it."""
    script = "import sys; sys.modules['pydantic'] = None; from nsa_launch.cli import main; sys.exit(main(['config']))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == exit_codes.BAD_CONFIG
    assert "needs pydantic, which is not installed here" in run.stderr


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["stpes=3"], "did you mean run.steps?"),
        (["sequence_length=300"], "take sequence_length=512"),
        (["processes_per_node=3"], "start 4 processes"),
        (["processes_per_node=4000", "global_batch_size=2000"], "start fewer processes"),
        (["nodes=2", "processes_per_node=2", "global_batch_size=2"], "or take launch.nodes=1"),
        (["address=ray://head:10001"], "nsa-dist submit CONFIG.yaml --address"),
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
