"""What a cluster lacks while ranks that were up are down: said when it changes, as nothing else of the wait is seen."""

import time
from collections.abc import Callable

_INTERVAL_S = 2.0  # between two questions to the cluster


class Room:
    """Asks now and then whether the cluster has room for the ranks, while there are none.

    missing     what it lacks at this moment, in words; empty when it has everything
    said        what has been said of it already
    """

    def __init__(self, say: Callable[[str], None], missing: Callable[[], str], patience_s: float, said: str) -> None:
        self._say = say
        self._missing = missing
        self._patience_s = patience_s
        self._said = said
        self._due_s = 0.0

    def look(self, ranks_are_up: bool) -> None:
        """To be called often; ranks that are up have their room."""
        if ranks_are_up:
            self._said = ""
        elif time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _INTERVAL_S
            missing = self._missing()
            if missing and missing != self._said:
                self._say(f"the cluster lacks {missing}; waiting up to {self._patience_s:g} s for a node")
            self._said = missing
