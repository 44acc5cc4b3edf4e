"""Out of memory where no launcher watches: under torchrun the rank itself says it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nsa_dist.train.files.records import MetricsFollower
from nsa_launch.config import RunConfig
from nsa_launch.memory.record import is_out_of_memory
from nsa_launch.run_folder import RunFolder


@contextmanager
def shortage_said(config: RunConfig, folder: RunFolder, rank: int) -> Iterator[None]:
    """What `out_of_memory_noted` wrote down inside is said, by the first rank of an attempt that it happened to."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            from nsa_launch.memory import shown  # the planner, which other runs do not need

            events = _of_last_start(folder)
            first = next((event for event in events if event["event"] == "out_of_memory"), {})
            if first.get("rank") == rank:
                print("\n".join(shown.lines(config, first, config.world_size)), file=sys.stderr, flush=True)
        raise


def _of_last_start(folder: RunFolder) -> list[dict]:
    events = [event for event in MetricsFollower(folder.launches).poll() if "event" in event]
    starts = [number for number, event in enumerate(events) if event["event"] == "start"]
    return events[starts[-1] if starts else 0 :]
