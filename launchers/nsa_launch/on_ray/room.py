"""What a cluster lacks while no rank is up: said when it changes, as nothing else of the wait is seen."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

_INTERVAL_S = 2.0  # from an answer of the cluster to the next question


class Room:
    """Asks now and then whether the cluster has room for the ranks, while there are none.

    The question is asked in a thread: Ray answers within milliseconds, but not for minutes while its head is out of
    reach, and signals and news of the ranks cannot wait for that.

    missing     what it lacks at this moment, in words; empty when it has everything
    """

    def __init__(self, say: Callable[[str], None], missing: Callable[[], str], patience_s: float) -> None:
        self._say = say
        self._missing = missing
        self._patience_s = patience_s
        self._said = ""
        self._due_s = 0.0
        self._question: _Question | None = None

    def look(self, ranks_are_up: bool) -> None:
        """To be called often; it does not wait. Ranks that are up have their room."""
        if ranks_are_up:
            self._said, self._question = "", None  # an answer that is still to come is none any more
            return
        if self._question is not None and not self._question.thread.is_alive():
            self._tell(self._question.answer)
            self._question = None
            self._due_s = time.monotonic() + _INTERVAL_S
        if self._question is None and time.monotonic() >= self._due_s:
            self._question = _Question(self._missing)

    def _tell(self, missing: str | None) -> None:
        if missing is None:
            return
        if missing and missing != self._said:
            self._say(f"the cluster lacks {missing}; waiting up to {self._patience_s:g} s for a node")
        self._said = missing


class _Question:
    """One, and its answer when `thread` has ended; None if Ray failed to answer, which may be its end."""

    def __init__(self, missing: Callable[[], str]) -> None:
        self.answer: str | None = None
        self._missing = missing
        self.thread = threading.Thread(target=self._ask, name="ask-for-room", daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        with suppress(Exception):
            self.answer = self._missing()
