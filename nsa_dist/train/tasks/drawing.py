"""What drawn tasks are put together of: filler, evidence at drawn depths, and answers that are known by their place."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LETTERS, DIGITS = b"abcdefghijklmnopqrstuvwxyz", b"0123456789"
_CAPITALS = LETTERS.upper()
_WORDS = (
    b"the rain falls on an old roof and a cat sleeps by the stove while the clock ticks on with no one there to hear "
    b"it so the day goes by as days do in a house at the end of the lane where the garden meets the wood"
).split()
_SPACED = [word + b" " for word in _WORDS]
_SPANS = np.array([len(word) for word in _SPACED])


@dataclass(frozen=True)
class Answer:
    """Bytes `[start, stop)` of a drawn text that follow from its beginning, and where that says so.

    depth   of the evidence: 0 for the first byte of the text, below 1
    """

    start: int
    stop: int
    depth: float


@dataclass(frozen=True)
class Drawn:
    """One text of a task, every byte of it, and the answers in it by their places."""

    text: bytes
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Evidence:
    """A piece that is put into filler; `key` is the name by which a question asks for it."""

    piece: bytes
    key: bytes
    value: bytes


def with_questions(
    rng: np.random.RandomState,
    length: int,
    evidence: Sequence[Evidence],
    question: bytes,
    asked: Sequence[Evidence] | None = None,
    in_order: bool = False,
) -> Drawn:
    """`length` bytes: filler with `evidence` at drawn depths, then questions in drawn order, and their answers.

    question    with %s for the key; the value follows it, and a full stop
    asked       which of the evidence is asked for; None: all
    in_order    pieces stand in the order given, as each needs those before it
    """
    asked = evidence if asked is None else asked
    tail = sum(len(question % each.key) + len(each.value) + 2 for each in asked)
    room = length - tail - sum(len(each.piece) for each in evidence)
    text, places = in_filler(rng, room, [each.piece for each in evidence], in_order)
    place_of = {each.key: place for each, place in zip(evidence, places, strict=True)}
    answers = []
    for which in rng.permutation(len(asked)):
        each = asked[which]
        text += question % each.key
        answers.append(Answer(len(text), len(text) + len(each.value), place_of[each.key] / length))
        text += each.value + b". "
    return Drawn(bytes(text), tuple(answers))


def names(rng: np.random.RandomState, number: int) -> list[bytes]:
    """Different ones, of three capital letters."""
    return letters_of(rng.permutation(len(_CAPITALS) ** 3)[:number], _CAPITALS, 3)


def letters_of(numbers: np.ndarray, alphabet: bytes, width: int) -> list[bytes]:
    """Each number written with `width` letters of `alphabet` as its digits, the last of them first."""
    base = len(alphabet)
    return [bytes(alphabet[n // base**place % base] for place in range(width)) for n in map(int, numbers)]


def digits(rng: np.random.RandomState, number: int) -> bytes:
    return drawn_of(rng, DIGITS, number)


def drawn_of(rng: np.random.RandomState, alphabet: bytes, number: int) -> bytes:
    """`number` bytes, each any of `alphabet`."""
    return np.frombuffer(alphabet, dtype=np.uint8)[rng.randint(len(alphabet), size=number)].tobytes()


def in_filler(
    rng: np.random.RandomState, room: int, pieces: Sequence[bytes], in_order: bool = False
) -> tuple[bytearray, list[int]]:
    """`room` bytes of words with the pieces between them, and the place of each piece."""
    words = _filler(rng, room)
    gaps = rng.randint(len(words) + 1, size=len(pieces))
    gaps = np.sort(gaps) if in_order else gaps
    text, places, done = bytearray(), [0] * len(pieces), 0
    for which in np.argsort(gaps, kind="stable"):
        text += b"".join(words[done : gaps[which]])
        done = int(gaps[which])
        places[which] = len(text)
        text += pieces[which]
    return text + b"".join(words[done:]), places


def _filler(rng: np.random.RandomState, room: int) -> list[bytes]:
    """Words and their spaces, `room` bytes of them; the last is cut."""
    drawn = rng.randint(len(_SPACED), size=1 + room // 2)  # no word is shorter, its space counted
    if room <= 0:
        return []
    ends = _SPANS[drawn].cumsum()
    last = int(ends.searchsorted(room))
    words = [_SPACED[which] for which in drawn[: last + 1].tolist()]
    too_many = int(ends[last]) - room
    words[-1] = words[-1][: len(words[-1]) - 1 - too_many] + b" "
    return words
