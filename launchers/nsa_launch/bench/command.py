"""`nsa-dist bench`: who does what was asked for."""

import subprocess
import sys
from pathlib import Path

from nsa_launch import exit_codes
from nsa_launch.bench import ranks, share
from nsa_launch.bench.request import Request


def run(request: Request) -> int:
    """The exit code."""
    failed = share.run(request) if request.place is None else ranks.run(request, request.place)
    return exit_codes.FAILED if failed else exit_codes.OK


def run_kernels(words: list[str]) -> int:
    """kernels/bench/run.py with these words; it lies in a source checkout only."""
    import nsa_kernels

    script = Path(nsa_kernels.__path__[0]).parent / "bench" / "run.py"
    if not script.exists():
        print(
            f"nsa-dist: {script} does not exist: the kernels' benchmark is not part of the installed package; run "
            f"this from a source checkout, installed with pip install --editable .",
            file=sys.stderr,
        )
        return exit_codes.BAD_CONFIG
    return subprocess.call([sys.executable, str(script), *words])
