"""The tasks, in the manner of RULER (arXiv 2404.06654) and of associative recall (arXiv 2312.04927), written in bytes.

    passkey     one number in filler, at a drawn depth, asked for at the end
    needle      one to eight names with a number each, at drawn depths; every name is asked for
    tracking    a variable gets a number, others get it from one another; every variable's number is asked for. Two such
                chains where there is room
    copy        drawn letters, and the same letters once more
    recall      pairs of a key and a value fill the first three quarters; keys are asked for in the last one

    ...the roof by The number of QXB is 48213. rain and... | The number of QXB is 48213.
                                                                                   ^^^^^ the answer

The questions come after everything else, so that what is looked for was not known when it was read.
"""

from collections.abc import Callable

import numpy as np

from nsa_dist.train.tasks.drawing import (
    DIGITS,
    LETTERS,
    Answer,
    Drawn,
    Evidence,
    digits,
    drawn_of,
    letters_of,
    names,
    with_questions,
)

_NUMBER = 5  # digits
_PIECE = 8  # letters of a copy that are one answer
_MOST_NEEDLES = 8
_MOST_VARIABLES = 5  # of a chain
_KEY_LETTERS = LETTERS + LETTERS.upper()
_TWO_LETTERS_SUFFICE = 8192  # bytes: then there are 2048 pairs, and 52**2 keys


def passkey(rng: np.random.RandomState, length: int) -> Drawn:
    key = digits(rng, _NUMBER)
    evidence = Evidence(b"The pass key is %s. Remember it. " % key, b"pass key", key)
    return with_questions(rng, length, [evidence], b"The %s is ")


def needle(rng: np.random.RandomState, length: int) -> Drawn:
    asked, ends = b"The number of %s is ", b"%s. "
    size = len(asked % b"QXB") + _NUMBER + 2
    most = max(1, min(_MOST_NEEDLES, length // (4 * size)))
    found = [(name, digits(rng, _NUMBER)) for name in names(rng, 1 + rng.randint(most))]
    evidence = [Evidence(asked % name + ends % value, name, value) for name, value in found]
    return with_questions(rng, length, evidence, asked)


def tracking(rng: np.random.RandomState, length: int) -> Drawn:
    room = length // 2 // 56  # variables whose assignment and question fill half of the text
    chains = 2 if room >= 4 else 1
    sizes = [2 + rng.randint(max(1, min(_MOST_VARIABLES, room // chains) - 1)) for _ in range(chains)]
    unused, evidence = iter(names(rng, sum(sizes))), []
    for size in sizes:
        value, before = digits(rng, _NUMBER), b""
        for name in (next(unused) for _ in range(size)):
            piece = b"Let %s be %s. " % (name, b"as " + before if before else value)
            evidence.append((Evidence(piece, name, value), rng.random_sample()))
            before = name
    return with_questions(rng, length, _woven(evidence, sizes), b"The value of %s is ", in_order=True)


def _woven(evidence: list[tuple[Evidence, float]], sizes: list[int]) -> list[Evidence]:
    """The chains among one another, each in its own order."""
    keys, first = [], 0
    for size in sizes:
        keys += sorted(key for _, key in evidence[first : first + size])
        first += size
    return [evidence[which][0] for which in np.argsort(keys, kind="stable")]


def copy(rng: np.random.RandomState, length: int) -> Drawn:
    number = (length - 1) // 2
    letters = drawn_of(rng, LETTERS, number)
    starts = range(0, number, _PIECE)
    answers = (Answer(number + 1 + n, number + 1 + min(n + _PIECE, number), n / length) for n in starts)
    return Drawn(letters + b"|" + letters, tuple(answers))


def recall(rng: np.random.RandomState, length: int) -> Drawn:
    """Keys are two letters, three in texts that have more pairs than that; none comes twice. A value is a digit."""
    width = 2 if length <= _TWO_LETTERS_SUFFICE else 3
    number, asked = length * 3 // 4 // (width + 1), length // 4 // (width + 1)
    keys = letters_of(rng.permutation(len(_KEY_LETTERS) ** width)[:number], _KEY_LETTERS, width)
    values = drawn_of(rng, DIGITS, len(keys))
    pairs = b"".join(key + values[n : n + 1] for n, key in enumerate(keys))
    text, answers = bytearray(pairs), []
    for which in rng.permutation(len(keys))[:asked]:
        text += keys[which]
        answers.append(Answer(len(text), len(text) + 1, (width + 1) * which / length))
        text += values[which : which + 1]
    return Drawn(bytes(text), tuple(answers))


TASKS: dict[str, Callable[[np.random.RandomState, int], Drawn]] = {
    task.__name__: task for task in (passkey, needle, tracking, copy, recall)
}
