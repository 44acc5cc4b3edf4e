"""The time of steps, what is between them left out."""

import time


class Clock:
    """Seconds spent inside `with clock:`, in all and since the last lap."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._lap_s, self._laps = 0.0, 0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        seconds = time.perf_counter() - self._start
        self.total_s += seconds
        self._lap_s += seconds
        self._laps += 1

    def lap(self) -> tuple[int, float]:
        """(times inside, seconds inside) since the last lap."""
        steps, seconds = self._laps, self._lap_s
        self._lap_s, self._laps = 0.0, 0
        return steps, seconds
