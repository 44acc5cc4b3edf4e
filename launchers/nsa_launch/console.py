"""What a person sees of a run: its milestones, a progress bar, and at the end where everything is.

It reads the run's files and nothing else, so it shows the same wherever the ranks are.
"""

from collections.abc import Mapping
from typing import Any

from nsa_launch import rank_output
from nsa_launch.config import RunConfig
from nsa_launch.json_lines import Follower
from nsa_launch.run_folder import RunFolder

_RANKS_SHOWN = 2  # of those that failed; one dead rank takes all others with it


class Console:
    """Follows `launches.jsonl` and `metrics.jsonl` of one run and prints."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config = config
        self._folder = folder
        self._events = Follower(folder.launches)
        self._metrics = Follower(folder.metrics)
        self.ranks_are_up = False

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        print(text, flush=True)

    def update(self) -> None:
        """Show what has been written since the last call."""
        for event in self._events.read():
            self._show_event(event)
        for record in self._metrics.read():
            print(record)

    def _show_event(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        self.ranks_are_up = kind == "start"
        if kind == "start":
            self.say(f"{event['world_size']} ranks are up, training from step {event['step']}")
        elif kind == "failure":
            ranks = ", ".join(f"rank {rank} ({reason})" for rank, reason in event["ranks"].items())
            self.say(f"lost {ranks}")

    def finish(self, step: int, stopped: bool) -> None:
        """The last words of a run whose ranks came to an end."""
        self.say(f"{'stopped at' if stopped else 'finished'} step {step}")

    def show_failure(self, failures: Mapping[int, BaseException]) -> None:
        """The ends of the files of ranks that failed for good."""
        for rank in sorted(failures)[:_RANKS_SHOWN]:
            path = self._folder.rank_log(rank)
            self.say(f"--- rank {rank}: the end of {path}\n{rank_output.tail(path)}")
        self.say(f"training failed on {len(failures)} ranks; their output is in {self._folder.rank_log(0).parent}")
