"""What can be said of a command without running it: its words are ones that its program takes, its files are there."""

import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

from nsa_launch import cli
from nsa_launch.config import load
from nsa_launch.jobs import remote

ROOT = Path(__file__).parents[1]
Words = list[str]


def check(command: str) -> None:
    """AssertionError or the program's own error if the command would be refused, or if nobody knows how to check it."""
    program, *words = shlex.split(command.partition(" > ")[0], comments=True)
    assert program in CHECKS, f"`{command}`: nobody knows how to check {program}; add it to CHECKS in {__file__}"
    CHECKS[program](words)


def _nsa_dist(words: Words) -> None:
    """Refused words make argparse exit; a configuration that cannot work is a ValueError."""
    try:
        arguments = cli.parser().parse_args(words)
    except SystemExit as refusal:
        raise AssertionError(f"nsa-dist does not take {words}") from refusal
    if words[0] in ("train", "plan"):
        _config([str(arguments.config), *arguments.overrides])
    elif words[0] in ("submit", "status", "logs", "stop", "render"):
        remote.load(ROOT / arguments.config, arguments.overrides)


def _config(words: Words) -> None:
    path, *overrides = words
    load(ROOT / path.removeprefix("/app/"), overrides)


def _torchrun(words: Words) -> None:
    arguments = get_args_parser().parse_args(words)
    if arguments.module:
        assert arguments.training_script == "nsa_launch.torchrun"
        _config(arguments.training_script_args)
    else:
        _is_python([arguments.training_script])


def _make(words: Words) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    subprocess.run(["make", "-n", *words], cwd=ROOT, env=environment, check=True, capture_output=True)


def _is_python(words: Words) -> None:
    compile((ROOT / words[0]).read_text(encoding="utf-8"), words[0], "exec")


def _pytest(words: Words) -> None:
    """Its first word is a file or a folder of tests, its others are pytest's own."""
    assert (ROOT / words[0]).exists()
    assert words[1:] in ([], ["-m", "slow"])


def _pip(words: Words) -> None:
    action, what = words
    extras = re.fullmatch(r"\.\[(\w+)\]", what)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert action == "install"
    assert extras is not None
    assert extras[1] in project["optional-dependencies"]


def _sbatch(words: Words) -> None:
    script, *rest = words
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert all("=" in word for word in rest)  # the configuration is inside


def _kubectl(words: Words) -> None:
    action, flag, path = words
    assert (action, flag) == ("apply", "-f")
    assert all(document["kind"] for document in yaml.safe_load_all((ROOT / path).read_text(encoding="utf-8")))


def _ray(words: Words) -> None:
    assert words[:2] == ["job", "submit"]
    check(shlex.join(words[words.index("--") + 1 :]))


def _source(words: Words) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert words == [re.findall(r"^VENV\s*:= (\S+)$", makefile, re.M)[0] + "/bin/activate"]


CHECKS: dict[str, Callable[[Words], None]] = {
    "nsa-dist": _nsa_dist,
    "torchrun": _torchrun,
    "make": _make,
    "python": _is_python,
    "pytest": _pytest,
    "pip": _pip,
    "sbatch": _sbatch,
    "kubectl": _kubectl,
    "ray": _ray,
    "source": _source,
}
