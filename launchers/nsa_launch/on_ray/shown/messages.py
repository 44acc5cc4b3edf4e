"""What Ray tells its driver unasked: paragraphs with a terminal's colours, which would land in files as they are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nsa_launch.on_ray.failures import plain

_LONGEST = 240


@contextmanager
def shortened(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, every such paragraph becomes one plain line, the same one not twice; all of it is in Ray's own logs."""
    from ray._private import worker

    original, said = worker.print_to_stdstream, set()

    def show(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        for paragraph in data["lines"]:
            line = plain(str(paragraph), _LONGEST)
            if line and line[:80] not in said:
                said.add(line[:80])
                say(f"Ray says: {line}")

    worker.print_to_stdstream = show
    try:
        yield
    finally:
        worker.print_to_stdstream = original
