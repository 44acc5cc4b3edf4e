"""Says that a run stands still, while it does, and who holds it up."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nsa_launch.config import LaunchSection
from nsa_launch.hangs import signs
from nsa_launch.hangs.signs import ALIVE, Sign
from nsa_launch.hangs.verdict import described, hung, phase_words
from nsa_launch.run_folder import PROCESS_DIED, RunFolder

_LOOK_S = 1.0  # between two looks


@dataclass(frozen=True)
class Standstill:
    """A run that has not moved: what is said of it, and who gave signs."""

    lines: list[str]
    signs: list[Sign]

    @property
    def speaker(self) -> int:
        """The first rank that can still speak, where no launcher does."""
        return min(sign.rank for sign in self.signs if not signs.silence_s(sign, self.signs))


class HangWatch:
    """Looks at the signs of rank 0, and at everybody's once that has not moved for too long.

    limit       seconds: `launch.stall_steps` times what the phase took lately, at least `launch.stall_least_s`, or
                half of the process groups' timeout where that is less, so that it is said before they give up
    """

    def __init__(self, launch: LaunchSection, folder: RunFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._launch, self._folder, self._clock = launch, folder, clock
        self._seen: tuple[int, str, int] | None = None  # process, phase and step of rank 0
        self._since = self._looked = clock()
        self._said_s = 0.0  # how long it had stood still when it was said last

    def poll(self) -> Standstill | None:
        """What is to be said now; None most of the time. Once when the limit is reached, and when twice as long."""
        now = self._clock()
        if now - self._looked < _LOOK_S:
            return None
        self._looked = now
        first = signs.read(self._folder.pulses, 0)
        if first is None or first.state != ALIVE:
            return None
        if (seen := (first.pid, first.phase, first.step)) != self._seen:
            self._seen, self._since, self._said_s = seen, now, 0.0
            return None
        stood_s = now - self._since
        if stood_s < max(self._limit_s(first), 2 * self._said_s):
            return None
        self._said_s = stood_s
        return self._standstill(first, stood_s)

    def _limit_s(self, sign: Sign) -> float:
        launch = self._launch
        least = min(launch.stall_least_s, launch.process_group_timeout_s / 2)
        return max(least, launch.stall_steps * (sign.usual_s or 0.0))

    def _standstill(self, first: Sign, stood_s: float) -> Standstill:
        everybody = signs.read_all(self._folder.pulses, self._folder.ranks())
        usual = f" (lately that took {first.usual_s:.3g} s)" if first.usual_s else ""
        head = f"nothing has moved for {stood_s:.0f} s: the run is {phase_words(first.phase, first.step)}{usual}"
        return Standstill([head, *(f"  {line}" for line in described(everybody))], everybody)


def hung_ranks(folder: RunFolder, failed: Mapping[int, str], timeout_s: float) -> dict[str, str]:
    """{rank: what is known of it} of those that held up the others until a collective gave up.

    failed      {rank: why}, as the launcher found it. Over NCCL a rank whose collective times out dies of it
    timeout_s   of the collectives: who failed sooner than that did not wait for anybody
    """
    everybody = signs.read_all(folder.pulses, folder.ranks())
    dead = {rank for rank, why in failed.items() if why == PROCESS_DIED}
    silent = {sign.rank: signs.silence_s(sign, everybody) for sign in everybody if sign.rank not in dead}
    waited = {sign.rank for sign in everybody if sign.rank in failed and sign.phase_s + 2 * sign.beat_s >= timeout_s}
    if not waited and max(silent.values(), default=0.0) < timeout_s / 2:
        return {}
    # Ray, too, may have missed a rank that does not answer, and count it among those that failed.
    gone = {rank for rank in failed if rank in dead or not silent.get(rank)}
    found = [each for each in hung(everybody, gone) if each.is_silent or dead <= waited]
    return {str(each.sign.rank): f"on {each.sign.host} {each.why}" for each in found}
