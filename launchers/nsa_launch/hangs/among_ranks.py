"""Hangs where no launcher watches: under torchrun the first rank that can still speak says them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nsa_dist.train.refused import Refused
from nsa_launch.config import LaunchSection
from nsa_launch.hangs import signs
from nsa_launch.hangs.watch import HangWatch, hung_ranks
from nsa_launch.run_folder import RunFolder


class RankWatch:
    """One rank's part: every rank looks, and one of them speaks."""

    def __init__(self, launch: LaunchSection, folder: RunFolder, rank: int) -> None:
        self._launch, self._folder, self._rank = launch, folder, rank
        self._watch = HangWatch(launch, folder)

    def look(self) -> None:
        """For `Pulse.on_beat`: says that the run stands still, and writes it down."""
        standstill = self._watch.poll()
        if standstill is not None and standstill.speaker == self._rank:
            self._folder.record("standstill", lines=standstill.lines)
            _say("\n".join(standstill.lines))

    @contextmanager
    def naming_the_hung(self) -> Iterator[None]:
        """What fails inside because another rank hung is written down as that rank's failure, and said."""
        try:
            yield
        except Refused:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            hung = hung_ranks(self._folder, {self._rank: reason[0]}, self._launch.process_group_timeout_s)
            living = [sign.rank for sign in signs.read_all(self._folder.pulses, self._folder.ranks())]
            if hung and self._rank == min(rank for rank in living if str(rank) not in hung):
                self._folder.record("failure", ranks={str(self._rank): reason[0][:160]}, hung=hung)
                _say("\n".join(f"rank {rank} {why}" for rank, why in hung.items()))
            raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
