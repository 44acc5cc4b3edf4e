"""Hangs where no launcher watches: under torchrun the first rank that can still speak says them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nsa_dist.train.refused import Refused
from nsa_launch.config import LaunchSection
from nsa_launch.hangs import nccl, signs
from nsa_launch.hangs.watch import HangWatch, hung_ranks
from nsa_launch.run_folder import RunFolder


class RankWatch:
    """One rank's part: every rank looks, and one of them speaks.

    timed_out   whether a collective has, in a process that is about to end of it
    """

    def __init__(
        self, launch: LaunchSection, folder: RunFolder, rank: int, timed_out: Callable[[], bool] = nccl.timed_out
    ) -> None:
        self._launch, self._folder, self._rank, self._timed_out = launch, folder, rank, timed_out
        self._watch = HangWatch(launch, folder)
        self._has_named = False

    def look(self) -> None:
        """For `Pulse.on_beat`: says, and writes down, that the run stands still, and over NCCL who ended it."""
        standstill = self._watch.poll()
        if standstill is not None and standstill.speaker == self._rank:
            self._folder.record("standstill", lines=standstill.lines)
            _say("\n".join(standstill.lines))
        if self._timed_out():
            self._name_hung("a collective timed out, and NCCL ended its process")

    @contextmanager
    def naming_the_hung(self) -> Iterator[None]:
        """What fails inside because another rank hung is written down as that rank's failure, and said."""
        try:
            yield
        except Refused:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            self._name_hung(reason[0])
            raise

    def _name_hung(self, reason: str) -> None:
        """What this rank failed of, if another held it up; the first rank that does not hang speaks."""
        if self._has_named:
            return
        self._has_named = True
        hung = hung_ranks(self._folder, {self._rank: reason}, self._launch.process_group_timeout_s)
        living = [sign.rank for sign in signs.read_all(self._folder.pulses, self._folder.ranks())]
        if hung and self._rank == min(rank for rank in living if str(rank) not in hung):
            self._folder.record("failure", ranks={str(self._rank): reason[:160]}, hung=hung)
            _say("\n".join(f"rank {rank} {why}" for rank, why in hung.items()))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
