"""Ctrl-C and SIGTERM: the first asks the ranks to save and stop, the second gives up waiting for them."""

import signal
from collections.abc import Callable
from types import FrameType


class StopSignals:
    """Handlers for SIGINT and SIGTERM, main thread only; `install` again when a library has taken them over."""

    def __init__(self, on_first: Callable[[int], None]) -> None:
        self._on_first = on_first
        self._previous: dict[int, signal._HANDLER] = {}
        self.received: int | None = None
        self.aborted = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._handle)
            if previous != self._handle:
                self._previous.setdefault(number, previous)

    def __enter__(self) -> "StopSignals":
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            self._on_first(number)
        else:
            self.aborted = True
