"""The way to the first step: a word on what is being waited for, and at the end how long each part took."""

import time
from collections.abc import Callable

_STAGES = {  # in order; the name of what a stage's end has brought, and what is said while it lasts
    "Ray": "Ray is starting",
    "processes": "the ranks' processes are starting",
    "imports": "the ranks are importing PyTorch and Megatron-core",
    "model and data": "the ranks are building the model and reading the data",
    "first steps": "the ranks are at their first steps",
}
_WORD_EVERY_S = 15.0


class Startup:
    """Seconds from the command's start to the first step, by stage.

    began_s  `time.monotonic()` when the command started; what lies before the first stage counts as "command"
    """

    def __init__(self, say: Callable[[str], None], began_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._began_s = began_s
        self._lap_s = self._said_s = clock()
        self.seconds = {"command": self._lap_s - began_s}
        self._left = list(_STAGES)

    @property
    def is_over(self) -> bool:
        """The last stage has been reached."""
        return not self._left

    def reached(self, stage: str) -> None:
        """`stage` is done, and so is all before it; later calls for the same one change nothing."""
        if stage not in self._left:
            return
        now = self._clock()
        self._left = self._left[self._left.index(stage) + 1 :]
        self.seconds[stage] = now - self._lap_s
        self._lap_s = self._said_s = now
        if not self._left:
            self._say(self.line())

    def wait(self, detail: Callable[[], str] = str) -> None:
        """Call it again and again: what is waited for is said now and then, with `detail` where that knows more."""
        now = self._clock()
        if self._left and now - self._said_s >= _WORD_EVERY_S:
            self._said_s = now
            more = detail()
            self._say(f"{_STAGES[self._left[0]]} ({now - self._lap_s:.0f} s so far){f'; {more}' if more else ''}")

    def line(self) -> str:
        """Where the time went."""
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        return f"first training record {self._clock() - self._began_s:.1f} s after the start ({parts})"
