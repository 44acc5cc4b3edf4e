"""Files of which one process at a time holds the lock."""

import fcntl
from typing import TextIO


def lock(file: TextIO) -> OSError | None:
    """Hold `file` until it is closed. BlockingIOError where another process does.

    Some network file systems have no locks: their error is returned, and the caller decides whether to go on without.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error
    return None
