"""Where a run speaks: a terminal, a file, or a pipe whose reader may leave."""

import os
import sys

from rich.console import Console


class Terminal(Console):
    """A `rich` console that a run outlives: when the reader of its output has left, as `| head` does, it falls silent.

    rich's own ends the process then. Whatever else writes to that pipe, on stdout or stderr, writes to nowhere.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere, broken = os.open(os.devnull, os.O_WRONLY), os.fstat(sys.stdout.fileno())
        for stream in (sys.stderr, sys.stdout):
            if os.path.samestat(os.fstat(stream.fileno()), broken):
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
