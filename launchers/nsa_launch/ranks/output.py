"""Each rank's stdout and stderr, native libraries' included, in a file of its own."""

import faulthandler
import os
import sys
from collections import deque
from pathlib import Path


def redirect(path: Path, title: str) -> None:
    """Send this process's file descriptors 1 and 2 to the end of `path`, and a traceback there if it crashes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    faulthandler.enable(file=2, all_threads=False)  # of the thread that crashed: Ray has a dozen others
    print(f"== {title}", flush=True)


def tail(path: Path, num_lines: int = 20) -> str:
    """The last lines of a rank's file, or a note that it wrote none."""
    if not path.exists():
        return f"({path} was never written: the process ended before its first line)"
    with path.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, maxlen=num_lines)).rstrip()
