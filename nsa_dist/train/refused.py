"""The exception of every check of a run."""


class Refused(ValueError):
    """What checks raise, before training and before each checkpoint: the caller has to change something.

    A launcher answers it with its message alone and does not try again, as it would with any other exception of a rank.
    """
