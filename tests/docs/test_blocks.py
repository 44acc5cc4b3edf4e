"""Every code block for readers runs as it stands, or is checked as far as it can be, or is marked as output."""

import contextlib
import io
import shlex
import subprocess
from pathlib import Path

import pytest

from code_blocks import MARKS, ROOT, Block, all_blocks, blocks, num_processes, pages, program
from nsa_launch import cli, exit_codes
from page_runs import run_page
from shell_checks import check

PYTHON_PAGES = [page for page in pages() if program(page).strip()]
RUN = {command: block for block in all_blocks("bash") for command in block.commands()}  # one of several pages once
CHECKED = [(block, command) for block in all_blocks("sh") for command in block.commands()]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_block_says_what_it_is(page):
    found = blocks(page)
    lines = page.read_text(encoding="utf-8").splitlines()
    fences = [line for line in lines if line.lstrip().startswith(("```", "~~~"))]
    assert len(fences) == 2 * len(found), f"{name(page)} has a fence that opens and does not close, or lies in another"
    for block in found:
        assert block.mark in MARKS, f"{block} is marked {block.mark!r}; mark it as tests/code_blocks.py says: {MARKS}"


def test_there_is_something_to_run():
    assert len(PYTHON_PAGES) >= 5
    assert len(RUN) >= 3
    assert len(CHECKED) >= 10


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name)
def test_python_runs(page, tmp_path):
    script = tmp_path / f"{page.stem}.py"
    script.write_text(program(page), encoding="utf-8")
    said = run_page(script, num_processes(page))
    assert not said, f"{name(page)} (line numbers are the page's): {said}"


@pytest.mark.parametrize("command", RUN)
def test_command_runs(command, tmp_path, monkeypatch):
    """From a folder with the repository's in it, where it may write."""
    for entry in ("configs", "launchers", "kernels"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    monkeypatch.chdir(tmp_path)
    written, _, file = command.partition(" > ")
    program, *words = shlex.split(written)
    assert program == "nsa-dist", f"{RUN[command]}: only nsa-dist runs here; mark the block `sh`"
    may_miss = words == ["doctor"]  # it looks at this machine, and says so if something is missing
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert cli.main(words) in ((exit_codes.OK, exit_codes.FAILED) if may_miss else (exit_codes.OK,))
    if file:
        Path(file).write_text(output.getvalue(), encoding="utf-8")


@pytest.mark.parametrize(("block", "command"), CHECKED, ids=[f"{block} {command}" for block, command in CHECKED])
def test_command_would_run(block: Block, command):
    check(command)


def test_python_that_fails_is_told(tmp_path):
    script = tmp_path / "page.py"
    script.write_text("import torch\nassert not torch.ones(1).any(), 'nothing is one'\n")
    assert "line 2" in (said := run_page(script, 1))
    assert "nothing is one" in said


@pytest.mark.parametrize("command", [
    "nsa-dist train configs/tiny-cpu.yaml no_such_key=1", "nsa-dist train configs/no-such.yaml", "nsa-dist fly",
    "nsa-dist bench cp --gpus all", "torchrun no_such_script.py", "make no-such-target", "pip install '.[nothing]'",
    "sbatch launchers/slurm/no-such.sbatch configs/long-1m.yaml", "rm -rf runs",
])  # fmt: skip
def test_what_would_not_run_is_found(command):
    with pytest.raises((AssertionError, ValueError, OSError, subprocess.CalledProcessError)):
        check(command)
