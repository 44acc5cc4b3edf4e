"""The thread of a rank that gives its signs of life. Training is told nothing of it and pays for none of it."""

import os
import socket
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nsa_dist.mcore.groups import collectives_begun
from nsa_launch.hangs import stack
from nsa_launch.hangs.signs import ALIVE, ENDED, FAILED, Sign, beat_s, write

_LATELY = 20  # times that a phase was passed through, of which the median is usual


class Pulse:
    """Inside `with`, a sign every second or so, of the thread that entered; longer apart in a run of many ranks.

    on_beat     called in the pulse's thread after each sign
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int, on_beat: Callable[[], None] = lambda: None) -> None:
        self._folder, self._rank, self._on_beat = folder, rank, on_beat
        self.beat_s = beat_s(num_ranks)
        self._began: tuple[str, int, float] = ("start", 0, time.monotonic())
        self._took: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LATELY))
        self._over = threading.Event()

    def __enter__(self) -> "Pulse":
        self._trains = threading.get_ident()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._give(ENDED if kind is None else FAILED)

    def begins(self, phase: str, step: int) -> None:
        """Called in the training thread: an assignment."""
        now = time.monotonic()
        last, _, since = self._began
        self._took[last].append(now - since)
        self._began = (phase, step, now)

    def _run(self) -> None:
        while not self._over.is_set():
            self._give(ALIVE)
            self._on_beat()
            self._over.wait(self.beat_s)

    def _give(self, state: str) -> None:
        phase, step, since = self._began
        took = list(self._took[phase])
        frames = stack.frames_of(self._trains)
        sign = Sign(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            beat_s=self.beat_s,
            phase=phase,
            step=step,
            phase_s=round(time.monotonic() - since, 3),
            usual_s=round(statistics.median(took), 4) if took else None,
            where=stack.told(frames),
            waits=stack.waits(frames),
            begun=_begun(),
            state=state,
        )
        with suppress(OSError):  # a full disk is found by those who cannot do without it
            write(self._folder, sign)


def _begun() -> dict[str, Any]:
    """Nothing while groups are made or closed under our eyes."""
    try:
        return collectives_begun()
    except (RuntimeError, ValueError, KeyError, AttributeError):
        return {}
