"""What becomes of a run whose reader has left."""

import subprocess
import sys

import pytest

SPEAKS = """
import sys
from nsa_launch.terminal import {name} as Terminal
terminal = Terminal()
terminal.print("first")
sys.stdin.readline()
for _ in range(3):
    terminal.print("nobody reads this")
    print("nor this", flush=True)
    print("nor this", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("went on")
"""


@pytest.mark.parametrize("both", [True, False], ids=["stderr too", "stdout alone"])
@pytest.mark.parametrize(("name", "goes_on"), [("Terminal", True), ("Console", False)])
def test_a_run_goes_on_when_the_reader_of_its_output_leaves(tmp_path, name, goes_on, both):
    command = [sys.executable, "-c", SPEAKS.format(name=name), str(tmp_path / "end")]
    errors = subprocess.STDOUT if both else subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        said = b"" if both else process.stderr.read()
        assert process.wait() == (0 if goes_on else 1)
    assert (tmp_path / "end").exists() == goes_on, "rich's own console ends the process: that is what is to be avoided"
    assert said.count(b"nor this") == (3 if goes_on and not both else 0)
