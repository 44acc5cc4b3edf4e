"""Who hangs, told from everybody's signs of life, in words."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nsa_launch.hangs.signs import ALIVE, Sign, silence_s

_SHOWN = 4  # ranks that are told one by one
_PLURAL = {"waits": "wait", "is": "are", "has": "have"}
_PHASES = {
    "start": "starting",
    "step": "in step {}",
    "validation": "in the validation after step {}",
    "checkpoint": "saving the checkpoint of step {}",
    "rewind": "going back to the last checkpoint after step {}",
    "pictures": "drawing the pictures",
}


@dataclass(frozen=True)
class Hung:
    """A rank that the others wait for, and how that is known."""

    sign: Sign
    why: str
    is_silent: bool = False

    def __str__(self) -> str:
        return f"rank {self.sign.rank} on {self.sign.host} {self.why}"


def hung(signs: Sequence[Sign], dead: Collection[int] = ()) -> list[Hung]:
    """The ranks that hold up the rest; empty if nothing tells them apart. `dead`: ranks known to be gone.

    Those whose process does not answer; or else those that have begun fewer collectives than others of their group; or
    else, where some wait in a collective, those that do not. A rank that has failed or died is not hung.
    """
    living = [sign for sign in signs if sign.state == ALIVE and sign.rank not in dead]
    silent = [(sign, silence_s(sign, signs)) for sign in living]
    found = [
        Hung(
            sign, f"does not answer: its process {sign.pid} has given no sign for {seconds:.0f} s, {_last(sign)}", True
        )
        for sign, seconds in silent
        if seconds
    ]
    if found:
        return found
    late = [(sign, group) for sign in living if (group := _behind(sign, signs))]
    if late and len(late) < len(signs):
        return [Hung(sign, f"has not come to a collective of {group}; it is {_now(sign)}") for sign, group in late]
    if any(sign.waits for sign in signs):
        return [Hung(sign, f"is in no collective; it is {_now(sign)}") for sign in living if not sign.waits]
    return []


def described(signs: Sequence[Sign]) -> list[str]:
    """A line for each rank that hangs, and one for each place where others wait."""
    found = hung(signs)
    names = {each.sign.rank for each in found}
    lines = [str(each) for each in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN} more: {_ranks([each.sign for each in found[_SHOWN:]])}")
    places: dict[str, list[Sign]] = {}
    for sign in signs:
        if sign.rank not in names:
            doing = f"{'waits' if sign.waits else 'is'} {_now(sign)}" if sign.state == ALIVE else f"has {sign.state}"
            places.setdefault(doing, []).append(sign)
    for place, there in sorted(places.items(), key=lambda item: -len(item[1]))[:_SHOWN]:
        verb, _, rest = place.partition(" ")
        lines.append(f"{_ranks(there)} {verb if len(there) == 1 else _PLURAL[verb]} {rest}")
    return lines


def phase_words(phase: str, step: int) -> str:
    return _PHASES.get(phase, f"in {phase} after step {{}}").format(step)


def _behind(sign: Sign, signs: Sequence[Sign]) -> str:
    """A group in which another rank has begun more collectives."""
    for group, number in sign.begun.items():
        if any(other.begun.get(group, number) > number for other in signs):
            return group
    return ""


def _now(sign: Sign) -> str:
    return f"{phase_words(sign.phase, sign.step)}, {_place(sign)}"


def _last(sign: Sign) -> str:
    return f"last seen {phase_words(sign.phase, sign.step)}, {_place(sign)}"


def _place(sign: Sign) -> str:
    """The innermost frame and, if that is a wait, the first below it that says what for."""
    if not sign.where:
        return "outside of Python"
    outside = [frame for frame in sign.where if "torch/distributed/" not in frame and "/comm.py" not in frame]
    first = sign.where[0]
    return f"at {first}" if not outside or outside[0] == first else f"at {first} for {outside[0]}"


def _ranks(signs: Sequence[Sign]) -> str:
    """`rank 3 on a`, `ranks 0, 2 to 7`."""
    if len(signs) == 1:
        return f"rank {signs[0].rank} on {signs[0].host}"
    numbers, parts = sorted(sign.rank for sign in signs), []
    while numbers:
        length = next((i for i, n in enumerate(numbers) if n != numbers[0] + i), len(numbers))
        first, last = numbers[0], numbers[length - 1]
        parts.append(f"{first}" if length == 1 else f"{first} to {last}" if length > 2 else f"{first}, {last}")
        numbers = numbers[length:]
    return f"ranks {', '.join(parts)}"
