"""A rank's file holds what Python and what native code wrote, and a crash leaves its traceback there."""

import subprocess
import sys

from nsa_launch.ranks import output as rank_output

_WRITES = """
import os, sys
from pathlib import Path
from nsa_launch.ranks import output as rank_output
rank_output.redirect(Path(sys.argv[1]), "rank 3")
print("from python", flush=True)
os.write(2, b"from native code\\n")
os.abort()
"""


def test_everything_goes_to_the_file(tmp_path):
    path = tmp_path / "logs" / "rank-0003.log"
    done = subprocess.run([sys.executable, "-c", _WRITES, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert done.stdout == done.stderr == ""
    written = path.read_text()
    assert written.startswith("== rank 3\nfrom python\nfrom native code\n")
    assert "Fatal Python error: Aborted" in written


def test_the_tail_is_the_end(tmp_path):
    path = tmp_path / "log"
    path.write_text("a\nb\nc\n")
    assert rank_output.tail(path, 2) == "b\nc"
    assert "was never written" in rank_output.tail(tmp_path / "none")
