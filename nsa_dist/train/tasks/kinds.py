"""The tasks, in the manner of RULER (arXiv 2404.06654) and of associative recall (arXiv 2312.04927), written in bytes.

    passkey     one number in filler, at a drawn depth, asked for at the end
    needle      one to eight names with a number each, at drawn depths; every name is asked for
    tracking    a variable gets a number, the next one the value of that, and so on, two to five in a chain; of one to
                eight such chains, woven into one another, one variable each is asked for
    copy        drawn letters, and the same letters once more
    recall      pairs of a key and a value in filler, one to as many as fill three quarters of the text, log-uniformly
                drawn; the last quarter asks for their keys

    ...the roof by The number of QXB is 48213. rain and... | The number of QXB is 48213.
                                                                                   ^^^^^ the answer

The questions come after everything else, so that what is looked for was not known when it was read.
"""

from collections.abc import Callable, Sequence

import numpy as np

from nsa_dist.train.tasks.drawing import (
    DIGITS,
    LETTERS,
    Answer,
    Drawn,
    Evidence,
    digits,
    drawn_of,
    in_filler,
    letters_of,
    names,
    with_questions,
)

_NUMBER = 5  # digits
_PIECE = 8  # letters of a copy that are one answer
_MOST_NEEDLES = 8
_MOST_CHAINS, _MOST_VARIABLES = 8, 5  # of a text, of a chain
_CHAIN_BYTES = 128  # of the longest chain and its question
_KEY_LETTERS = LETTERS + LETTERS.upper()
_TWO_LETTERS_SUFFICE = 8192  # bytes: there are 1536 pairs at most, and 52**2 keys


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
    number = max(1, min(_MOST_CHAINS, length // 2 // _CHAIN_BYTES))
    longest = _MOST_VARIABLES if length >= 2 * _CHAIN_BYTES else 3
    unused = iter(names(rng, number * longest))
    chains = []
    for _ in range(number):
        value, before = digits(rng, _NUMBER), b""
        chain = []
        for name in (next(unused) for _ in range(2 + rng.randint(longest - 1))):
            piece = b"Let %s be %s. " % (name, b"as " + before if before else value)
            chain.append(Evidence(piece, name, value))
            before = name
        chains.append(chain)
    asked = [chain[rng.randint(len(chain))] for chain in chains]
    return with_questions(rng, length, _woven(rng, chains), b"The value of %s is ", asked, in_order=True)


def _woven(rng: np.random.RandomState, chains: Sequence[Sequence[Evidence]]) -> list[Evidence]:
    """The chains among one another, each in its own order."""
    keys = np.concatenate([np.sort(rng.random_sample(len(chain))) for chain in chains])
    pieces = [piece for chain in chains for piece in chain]
    return [pieces[which] for which in np.argsort(keys, kind="stable")]


def copy(rng: np.random.RandomState, length: int) -> Drawn:
    number = (length - 1) // 2
    letters = drawn_of(rng, LETTERS, number)
    starts = range(0, number, _PIECE)
    answers = (Answer(number + 1 + n, number + 1 + min(n + _PIECE, number), n / length) for n in starts)
    return Drawn(letters + b"|" + letters, tuple(answers))


def recall(rng: np.random.RandomState, length: int) -> Drawn:
    """Keys are two letters, three in texts that have more pairs than that; none comes twice. A value is a digit."""
    width = 2 if length <= _TWO_LETTERS_SUFFICE else 3
    size = width + 2  # a key, a value, a space
    most = length * 3 // 4 // size
    number = int(most ** rng.random_sample())
    asked = min(number, length // 4 // size)
    keys = letters_of(rng.permutation(len(_KEY_LETTERS) ** width)[:number], _KEY_LETTERS, width)
    values = drawn_of(rng, DIGITS, number)
    pairs = [b"%s%c " % pair for pair in zip(keys, values, strict=True)]
    text, places = in_filler(rng, length - (number + asked) * size, pairs)
    answers = []
    for which in rng.permutation(number)[:asked]:
        answers.append(Answer(len(text) + width, len(text) + width + 1, places[which] / length))
        text += pairs[which]
    return Drawn(bytes(text), tuple(answers))


TASKS: dict[str, Callable[[np.random.RandomState, int], Drawn]] = {
    task.__name__: task for task in (passkey, needle, tracking, copy, recall)
}
